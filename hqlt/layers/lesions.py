"""Lesions: a layer computes without the read of one memory, or with a fixed gate. No weight changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqlt.layers.hybrid_memory import HybridMemory

NONE = "none"


@dataclass(frozen=True)
class Lesion:
    """What is taken from every layer.

    Attributes:
        kv, fw: whether the read of that memory is 0 in place of what it is. Both memories go on as before.
        gate: g in o = g ⊙ fw_read + (1 − g) ⊙ kv_read in place of what the mixer computes.
    """

    kv: bool = False
    fw: bool = False
    gate: float | None = None

    def __post_init__(self) -> None:
        if self.gate is not None and not 0 <= self.gate <= 1:
            raise ValueError(f"gate={self.gate} must lie in 0 … 1 (1 is FW memory alone)")

    @classmethod
    def parse(cls, text: str) -> Lesion:
        """``none``, ``kv``, ``fw`` or ``gate=0.5``.

        Raises:
            ValueError: another text.
        """
        name, _, value = text.partition("=")
        try:
            if name == "gate":
                return cls(gate=float(value))
            return {NONE: cls(), "kv": cls(kv=True), "fw": cls(fw=True)}[text]
        except (KeyError, ValueError) as error:
            raise ValueError(f"lesion={text!r} must be none, kv, fw or gate=G with G in 0 … 1") from error

    def reads(self, reads: list[Tensor], memories: tuple[str, ...]) -> list[Tensor]:
        """The reads, those that are taken away being 0."""
        pairs = zip(memories, reads, strict=True)
        return [torch.zeros_like(read) if getattr(self, name) else read for name, read in pairs]

    def concerns(self, layer: HybridMemory) -> bool:
        """Whether it changes what the layer computes."""
        both = layer.mixer is not None
        return (self.gate is not None and both) or any(getattr(self, name) for name in layer.memories)


@contextmanager
def lesion(model: nn.Module, *, kv: bool = False, fw: bool = False, gate: float | None = None) -> Iterator[None]:
    """Within the block, every layer of the model computes with a :class:`Lesion`; lesions do not nest.

    Raises:
        ValueError: no layer has what is to be taken away, or the model has a lesion already.
    """
    wanted = Lesion(kv, fw, gate)
    layers = [module for module in model.modules() if isinstance(module, HybridMemory)]
    if any(layer.lesion is not None for layer in layers):
        raise ValueError("the model has a lesion already; leave its block first")
    concerned = [layer for layer in layers if wanted.concerns(layer)]
    if wanted != Lesion() and not concerned:
        missing = "KV memory" if kv else "FW memory" if fw else "mixer of two memories"
        raise ValueError(f"no layer of the model has a {missing}; {wanted} would change nothing")
    for layer in concerned:
        layer.lesion = wanted
    try:
        yield
    finally:
        for layer in concerned:
            layer.lesion = None
