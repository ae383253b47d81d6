"""The device that is measured: its clock, its memory and its peaks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hqlt.analysis.devices import peak_bandwidth, peak_flops
from hqlt.bench.gpu.counts import Work
from hqlt.bench.record import Record
from hqlt.bench.timing import Meter, Run


class CudaMeter(Meter):
    """Times by CUDA events; what a run has left in the L2 cache is overwritten before the next."""

    warm_up_seconds = 1.0

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def milliseconds(self, run: Run) -> float:
        """Between an event before the first and one after the last kernel of a run."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))

    def flush(self) -> None:
        """Overwrite the L2 cache."""
        self._flush.zero_()

    def peak_bytes(self, run: Run) -> int:
        """Most bytes that the allocator gave out at a time during a run, beyond those before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True, kw_only=True)
class Target:
    """What cases run on.

    Attributes:
        device: of the tensors. dtype: of the ops' inputs.
        meter: None where results are checked but not timed.
        bf16_peak, bandwidth: FLOP/s and bytes a second by the data sheet; None: unknown.
        memory: bytes.
    """

    device: torch.device
    dtype: torch.dtype
    meter: Meter | None = None
    bf16_peak: float | None = None
    bandwidth: float | None = None
    memory: float = float("inf")

    @classmethod
    def cuda(cls) -> Target:
        """The current CUDA device."""
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return cls(
            device=device,
            dtype=torch.bfloat16,
            meter=CudaMeter(device),
            bf16_peak=peak_flops(properties.name),
            bandwidth=peak_bandwidth(properties.name),
            memory=properties.total_memory,
        )

    @classmethod
    def interpreter(cls) -> Target:
        """The processor, where Triton's interpreter runs the kernels; it has no bfloat16."""
        return cls(device=torch.device("cpu"), dtype=torch.float16)

    @property
    def facts(self) -> dict[str, Any]:
        """What a number depends on beside the code and the processor."""
        if self.device.type != "cuda":
            return {"device": "none: checked by Triton's interpreter"}
        return {"device": torch.cuda.get_device_name(self.device), "cuda": torch.version.cuda, "memory": self.memory}

    def least(self, moved: float) -> float | None:
        """Milliseconds for so many bytes at the peak of memory."""
        return None if self.bandwidth is None else 1e3 * moved / self.bandwidth

    def rated(self, record: Record, work: Work) -> Record:
        """A record that was timed, with what was done and its shares of the peaks."""
        if record.milliseconds is None:
            return record
        seconds = record.milliseconds / 1e3
        return replace(
            record,
            moved=work.moved or None,
            flops=work.flops,
            bandwidth=work.moved / self.bandwidth / seconds if self.bandwidth and work.moved else None,
            compute=work.arithmetic_seconds(self.bf16_peak) / seconds if self.bf16_peak else None,
        )
