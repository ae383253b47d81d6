"""Keeping autocast out of what must not lose precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Run a function of tensors with autocast disabled on their device.

    A fast weight accumulates, so its products stay in the state dtype; and a hand-written backward pass keeps the
    dtypes of its forward pass even if ``backward()`` is called inside an autocast block.
    """

    @wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        device = next(x.device.type for x in (*arguments, *named.values()) if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return cast(Function, wrapped)
