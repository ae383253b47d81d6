"""Accelerators that a run may be planned for, and the peak of the one at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet.

    Attributes:
        name: as tables print it.
        bf16_flops: dense bfloat16 FLOPs per second, half of what is advertised with sparsity.
        memory_bytes: nominal; a driver reports a little more.
        bandwidth: of that memory, bytes per second.
    """

    name: str
    bf16_flops: float
    memory_bytes: float
    bandwidth: float

    def seconds(self, flops: float, devices: int = 1, utilisation: float = 1.0) -> float:
        """Time that N devices take for so many FLOPs altogether at this share of their peak.

        Raises:
            ValueError: no device, or a share outside (0, 1].
        """
        if devices < 1:
            raise ValueError(f"devices={devices} must be at least 1")
        check_utilisation(utilisation)
        return flops / (devices * self.bf16_flops * utilisation)


A100 = Device("A100-80GB", 312e12, 80e9, 2.039e12)
H100 = Device("H100-SXM", 989.4e12, 80e9, 3.35e12)
H200 = Device("H200", 989.4e12, 141e9, 4.8e12)
B200 = Device("B200", 2250e12, 180e9, 8e12)

# Words of a name and its peaks; the first row that fits holds. Boards with less power run the same chip slower, and
# older A100 have slower memory.
_PEAKS: tuple[tuple[frozenset[str], float, float], ...] = (
    (frozenset({"A100", "80GB"}), A100.bf16_flops, A100.bandwidth),
    (frozenset({"A100"}), A100.bf16_flops, 1.555e12),
    (frozenset({"H100", "PCIE"}), 756e12, 2.039e12),
    (frozenset({"H100", "NVL"}), 835.5e12, 3.938e12),
    (frozenset({"H100"}), H100.bf16_flops, H100.bandwidth),
    (frozenset({"H200", "NVL"}), 835.5e12, H200.bandwidth),
    (frozenset({"H200"}), H200.bf16_flops, H200.bandwidth),
    (frozenset({"B200"}), B200.bf16_flops, B200.bandwidth),
)


def check_utilisation(utilisation: float) -> None:
    """A utilisation is a share of a device's peak.

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must lie in (0, 1]: it is a share of the peak")


def peak_flops(torch_device_name: str) -> float | None:
    """Dense bfloat16 FLOPs per second of a device that ``torch.cuda.get_device_name()`` names; None if unknown.

    A slice of a device (MIG) is unknown: its name does not tell its share.
    """
    return _peaks(torch_device_name)[0]


def peak_bandwidth(torch_device_name: str) -> float | None:
    """Bytes per second of the device's memory, as :func:`peak_flops`."""
    return _peaks(torch_device_name)[1]


def _peaks(torch_device_name: str) -> tuple[float | None, float | None]:
    words = set(re.findall(r"[A-Z0-9]+", torch_device_name.upper()))
    fitting = (peaks for kind, *peaks in _PEAKS if kind <= words and "MIG" not in words)
    flops, bandwidth = next(fitting, (None, None))
    return flops, bandwidth
