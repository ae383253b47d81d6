"""A step on fixed memory, recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Buffers = list[dict[str, Tensor]]
Step = Callable[[Tensor, Tensor, Buffers], tuple[Tensor, Buffers]]


class GraphedStep:
    """One launch for all kernels of a step, which would otherwise wait for the host between any two.

    A graph knows addresses: it sees weights that change in place, not weights that are replaced.
    """

    def __init__(self, step: Step, model: nn.Module, position: Tensor, buffers: Buffers) -> None:
        """Record the step of input ids [N] and these positions and buffers, which it changes in place.

        What the buffers hold afterwards means nothing. Only the calls of kernels are recorded: a step must not look at
        values on the host.
        """
        self._input_ids = torch.zeros_like(position)
        self._weights = [parameter.detach() for parameter in model.parameters()]  # keeps their memory in place
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(position.device):
            apart = torch.cuda.Stream()
            apart.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(apart):
                step(self._input_ids, position, buffers)  # what happens once: kernels are compiled, tables made
            torch.cuda.current_stream().wait_stream(apart)
            with torch.cuda.graph(self._graph):
                self._logits, _ = step(self._input_ids, position, buffers)

    def __call__(self, input_ids: Tensor, position: Tensor, buffers: Buffers) -> tuple[Tensor, Buffers]:
        """Logits of these ids; positions and buffers are those that the step was recorded with."""
        self._input_ids.copy_(input_ids)
        self._graph.replay()
        return self._logits.clone(), buffers
