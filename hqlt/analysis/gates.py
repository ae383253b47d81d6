"""What the memory gate does: how much of each read a layer takes from FW memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hqlt.layers.mixers import Mixer
from hqlt.models.language_model import LanguageModel


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that a call of the model in this block fills: the weight of FW memory in every layer with a dynamic gate.

    Weights [T] are those of the first row, averaged over heads and channels.

    Raises:
        ValueError: no layer blends two memories by a gate.
    """
    gates: list[Tensor] = []

    def record(mixer: Mixer, inputs: tuple[Tensor, ...]) -> None:
        fw, _ = mixer.weights(inputs[0])
        gates.append(fw[0].float().mean((-1, -2)))

    mixers = [m for m in model.modules() if isinstance(m, Mixer) and m.kind.startswith("dynamic")]
    if not mixers:
        raise ValueError("no layer of this model blends two memories by a dynamic gate")
    handles = [mixer.register_forward_pre_hook(record) for mixer in mixers]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def memory_gates(model: LanguageModel, input_ids: Tensor) -> Tensor:
    """Weight of FW memory in every layer that has a mixer with a gate, averaged over heads and channels.

    Args:
        model: in evaluation mode.
        input_ids: one document [T].

    Returns:
        [layers, T]; for ``dynamic_vector`` 1 is FW memory alone and 0 is KV memory alone.

    Raises:
        ValueError: no layer blends two memories by a gate.
    """
    with recorded_gates(model) as gates:
        model(input_ids[None])
    return torch.stack(gates)
