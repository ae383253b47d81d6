"""The decoding step in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from hqlt.ops.blend import rms_norm
from hqlt.ops.checks import state_dtype
from hqlt.ops.delta.reference import write as delta_write
from hqlt.ops.features import unit_silu
from hqlt.ops.gated_delta.reference import write as gated_delta_write
from hqlt.ops.rotary import Angles, rotate
from hqlt.ops.step.ring import Ring
from hqlt.ops.window.chunked import attend

Gates = tuple[Tensor, Tensor | None]


def hybrid_step_reference(
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
    eps: float,
) -> Tensor:
    """What :func:`hqlt.ops.hybrid_step` returns and changes."""
    wide = state_dtype(query.dtype)
    reads = []
    if ring is not None:
        _append(ring, key, value, gates, position)
    if fast_weight is not None and gates is not None:
        if not anchored:
            tokens = (key, value) if ring is None else _older(ring, position, delay)
            _write(fast_weight, *tokens, gates, position >= delay)
        features = unit_silu(query.to(wide)) * query.shape[-1] ** -0.5
        reads.append((features.unsqueeze(-2) @ fast_weight).squeeze(-2))
    if ring is not None and window is not None:
        count = position % window + 1 if anchored else (position + 1).clamp(max=window)
        reads.append(_read_kv(query.to(wide), ring, position, count, window, angles))
    mixed = reads[0] if len(reads) == 1 else _mix(reads[0], reads[1], mixer, mixer_input)
    return mixed.to(value.dtype) if norm_weight is None else rms_norm(mixed, norm_weight, eps, value.dtype)


def _append(ring: Ring, key: Tensor, value: Tensor, gates: Gates | None, position: Tensor) -> None:
    new = (key, value, *(gates or (None, None)))
    document, slot = torch.arange(len(position), device=position.device), position % ring.key.shape[1]
    for part, x in zip(ring, new, strict=True):
        if part is not None:
            part[document, slot] = x


def _older(ring: Ring, position: Tensor, distance: Tensor | int) -> tuple[Tensor, Tensor]:
    """Key and value of the token at this distance; distances [m] give a row of tokens."""
    document = torch.arange(len(position), device=position.device)
    if isinstance(distance, Tensor):
        document, position = document[:, None], position[:, None]
    slot = (position - distance) % ring.key.shape[1]
    return ring.key[document, slot], ring.value[document, slot]


def _write(fast_weight: Tensor, key: Tensor, value: Tensor, gates: Gates, written: Tensor) -> None:
    """``written`` [N]: whether there is a token to write; what lies in the slot of one that is not may be anything."""
    beta, log_decay = gates
    key, value = (x.to(fast_weight.dtype).where(written[:, None, None], 0) for x in (key, value))
    tokens = (unit_silu(key), value, (beta * written[:, None]).to(fast_weight.dtype))
    if log_decay is None:
        fast_weight.copy_(delta_write(fast_weight, *tokens))
    else:
        fast_weight.copy_(gated_delta_write(fast_weight, *tokens, log_decay.to(fast_weight.dtype)))


def _read_kv(query: Tensor, ring: Ring, position: Tensor, count: Tensor, window: int, angles: Angles | None) -> Tensor:
    distance = torch.arange(window, device=position.device)
    visible = distance < count[:, None]
    keys, values = (x.to(query.dtype).where(visible[..., None, None], 0) for x in _older(ring, position, distance))
    if angles is not None:
        cos, sin = (x[:window, None] for x in angles)
        keys = rotate(keys, cos, -sin)
    return attend(query[:, None], keys, values, query.shape[-1] ** -0.5, 0.0, visible[:, None, None])[:, 0]


def _mix(fw_read: Tensor, kv_read: Tensor, mixer: str, mixer_input: Tensor | None) -> Tensor:
    if mixer_input is None:
        return fw_read + kv_read
    weights = mixer_input.to(fw_read.dtype)
    if mixer == "static_scalar":
        return weights[0] * fw_read + weights[1] * kv_read
    gate = weights.sigmoid()
    if mixer == "dynamic_vector":
        return torch.lerp(kv_read, fw_read, gate)
    fw, kv = gate.unsqueeze(-1).unbind(1) if mixer == "dynamic_scalar" else gate.chunk(2, -1)
    return fw * fw_read + kv * kv_read
