"""Initial weights of a model that was built on the meta device: drawn tensor by tensor, kept where they belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hqlt.models.language_model import LanguageModel
from hqlt.training.language import LanguageRecipe, Objective


def materialise(objective: Objective, recipe: LanguageRecipe, device: torch.device) -> None:
    """Give a model of :meth:`LanguageRecipe.outline` memory, and the weights of :meth:`LanguageRecipe.build`.

    Equal to the bit where the device is a CPU. A process keeps its own part of each tensor, so that beside its parts it
    needs room for the largest whole tensor only. Every process draws all numbers itself: nothing is sent.

    Args:
        objective: of the model; FSDP2 may have sharded it.
        recipe: of the model.
        device: of this process.
    """
    torch.manual_seed(recipe.training.seed)
    with _WholeOnHost():  # type: ignore[no-untyped-call]  # the constructor is that of torch
        with torch.device("meta"):
            _Constructed(recipe.model)
        objective.to_empty(device=device)
        objective.model.tie_weights()  # which memory of its own has parted
        objective.model.init_weights()
    if recipe.precision == "float64":
        objective.double()


class _Constructed(LanguageModel):
    """A model as far as its constructors go: those of torch draw weights too, before ours draws them again."""

    def init_weights(self) -> None:
        """Nothing."""


class _WholeOnHost(TorchDispatchMode):
    """What fills a tensor with random numbers draws those of the whole tensor on the host.

    They are then the same whatever the device is and whatever part of a sharded tensor is here; of a tensor on the
    meta device they are forgotten.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        x, *options = args
        drawn: Tensor = func(torch.empty(x.shape, dtype=x.dtype, device="cpu"), *options, **kwargs)
        if isinstance(x, DTensor):
            part = distribute_tensor(drawn, x.device_mesh, x.placements, src_data_rank=None)
            x.to_local().copy_(part.to_local())
        elif not x.is_meta:
            x.copy_(drawn)
        return x
