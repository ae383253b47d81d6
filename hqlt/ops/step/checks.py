"""Argument checks of the step: each names the offending value and the fix."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.checks import check_floats, check_shape, state_dtype
from hqlt.ops.rotary import Angles
from hqlt.ops.step.ring import Ring

Gates = tuple[Tensor, Tensor | None]
DYNAMIC = ("dynamic_scalar", "dynamic_vector", "dynamic_vector_separate")
MIXERS = ("sum", "static_scalar", *DYNAMIC)


def check_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    gates: Gates | None,
    fast_weight: Tensor | None,
    ring: Ring | None,
    window: int | None,
    delay: int,
    anchored: bool,
    angles: Angles | None,
    mixer: str,
    mixer_input: Tensor | None,
    norm_weight: Tensor | None,
) -> None:
    """Check the arguments of :func:`hqlt.ops.hybrid_step`."""
    _check_token(query, key, value, position)
    if fast_weight is None and ring is None:
        raise ValueError("fast_weight=None with ring=None leaves no memory; pass one of the two")
    _check_fast_weight(query, value, gates, fast_weight)
    _check_reach(ring, window, delay, anchored)
    if ring is not None:
        _check_ring(key, value, gates, ring, anchored)
        _check_angles(query, angles, window or 1)
    elif angles is not None:
        raise ValueError("angles have no effect with ring=None; leave them out")
    _check_mixer(value, mixer, mixer_input, fast_weight is not None and ring is not None)
    if norm_weight is not None:
        check_floats(value=value, norm_weight=norm_weight)
        check_shape("norm_weight", norm_weight, value.shape[-1:], "[V]")


def _check_token(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    check_floats(query=query, key=key, value=value)
    if query.dim() != 3 or not query.numel():
        raise ValueError(f"query has shape {tuple(query.shape)}; expected three axes [N, H, K], none of size 0")
    check_shape("key", key, query.shape, "[N, H, K]")
    check_shape("value", value, (*query.shape[:2], *value.shape[-1:]), "[N, H, V]")
    if not isinstance(position, Tensor) or position.dtype != torch.int64:
        kind = position.dtype if isinstance(position, Tensor) else type(position).__name__
        raise TypeError(f"position must be an int64 tensor, not {kind}")
    check_shape("position", position, query.shape[:1], "[N]")
    if position.device != query.device:
        raise ValueError(f"position is on {position.device} but query is on {query.device}; move it")


def _check_gate(name: str, gate: Tensor, like: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """A gate may be more precise than the tokens, not less."""
    exact = isinstance(gate, Tensor) and gate.dtype == state_dtype(like.dtype)
    check_floats(**({name: gate} if exact else {"query": like, name: gate}))
    check_shape(name, gate, shape, axes)


def _check_fast_weight(query: Tensor, value: Tensor, gates: Gates | None, fast_weight: Tensor | None) -> None:
    if fast_weight is None or gates is None:
        if fast_weight is not None or gates is not None:
            raise ValueError("gates and fast_weight belong together: pass both, or neither without FW memory")
        return
    for name, gate in zip(("beta", "log_decay"), gates, strict=True):
        if gate is not None or name == "beta":
            _check_gate(name, gate, query, tuple(query.shape[:2]), "[N, H]")  # type: ignore[arg-type]
    check_shape("fast_weight", fast_weight, (*query.shape, value.shape[-1]), "[N, H, K, V]")
    _check_in_place("fast_weight", fast_weight, state_dtype(query.dtype), query)


def _check_in_place(name: str, x: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}; beside {like.dtype} inputs it is {dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but query is on {like.device}; move it")
    if not x.is_contiguous():
        raise ValueError(f"{name} is changed in place and must be contiguous; call .contiguous() once, beforehand")


def _check_reach(ring: Ring | None, window: int | None, delay: int, anchored: bool) -> None:
    if ring is None:
        if window is not None or delay or anchored:
            raise ValueError(f"window={window}, delay={delay}, anchored={anchored} have no effect with ring=None")
        return
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window!r} must be a number of tokens that KV memory holds, at least 1")
    if not isinstance(delay, int) or not 0 <= delay <= window:
        raise ValueError(f"delay={delay!r} must lie in 0 … window={window}")
    if anchored and delay:
        raise ValueError(f"delay={delay} has no effect in an anchored step; leave it out")
    slots = ring.key.shape[1]
    if slots < max(window, delay + 1):
        raise ValueError(
            f"the ring has {slots} slots, too few for window={window} and delay={delay}; "
            f"make it {max(window, delay + 1)}"
        )


def _check_ring(key: Tensor, value: Tensor, gates: Gates | None, ring: Ring, anchored: bool) -> None:
    slots = (key.shape[0], ring.key.shape[1])
    for name, part, new in (("key", ring.key, key), ("value", ring.value, value)):
        check_shape(f"ring.{name}", part, (*slots, *new.shape[1:]), "[N, L, H, dim]")
        _check_in_place(f"ring.{name}", part, new.dtype, new)
    if anchored and gates is None:
        raise ValueError("an anchored step is one of two memories; pass gates and fast_weight")
    beta, log_decay = gates if anchored and gates is not None else (None, None)
    for name, kept, gate in (("beta", ring.beta, beta), ("log_decay", ring.log_decay, log_decay)):
        if (kept is None) != (gate is None):
            raise ValueError(f"ring.{name} keeps the gates of an anchored step with {name}, and of no other step")
        if kept is not None and gate is not None:
            check_shape(f"ring.{name}", kept, (*slots, key.shape[1]), "[N, L, H]")
            _check_in_place(f"ring.{name}", kept, gate.dtype, key)


def _check_angles(query: Tensor, angles: Angles | None, window: int) -> None:
    if angles is None:
        return
    if query.shape[-1] % 2:
        raise ValueError(f"a rotation turns pairs but K = {query.shape[-1]}; make it even or leave out angles")
    check_floats(cos=angles[0], sin=angles[1])
    for name, part in zip(("cos", "sin"), angles, strict=True):
        if part.dim() != 2 or part.shape[0] < window or part.shape[1] != query.shape[-1] // 2:
            raise ValueError(
                f"{name} has shape {tuple(part.shape)}; expected [≥ S, K / 2] with S = {window}, "
                f"K / 2 = {query.shape[-1] // 2}"
            )
        _check_in_place(name, part, torch.promote_types(query.dtype, torch.float32), query)


def _check_mixer(value: Tensor, mixer: str, mixer_input: Tensor | None, both: bool) -> None:
    if mixer not in MIXERS:
        raise ValueError(f"mixer={mixer!r} is unknown; choose one of {', '.join(MIXERS)}")
    if not both and mixer != "sum":
        raise ValueError(f"mixer={mixer!r} has no effect on one memory; leave it out")
    if mixer == "sum":
        if mixer_input is not None:
            raise ValueError("mixer_input has no effect with mixer='sum'; leave it out")
        return
    documents, heads, size = value.shape
    shapes = {
        "static_scalar": ((2,), "[2]"),
        "dynamic_scalar": ((documents, 2, heads), "[N, 2, H]"),
        "dynamic_vector": ((documents, heads, size), "[N, H, V]"),
        "dynamic_vector_separate": ((documents, heads, 2 * size), "[N, H, 2·V]"),
    }
    if mixer_input is None:
        raise ValueError(f"mixer={mixer!r} needs a mixer_input of shape {shapes[mixer][1]}")
    check_floats(value=value, mixer_input=mixer_input)
    check_shape("mixer_input", mixer_input, *shapes[mixer])
