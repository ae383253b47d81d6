"""The decoding step as one kernel: a program for each document and head.

Nothing that a program reads is written by it before, or by another: the new token's slot of the ring is written only,
since the program has the token itself; a column block of the fast weight is read, changed and written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqlt.ops.checks import state_dtype
from hqlt.ops.launch import on_device
from hqlt.ops.rotary import Angles
from hqlt.ops.step.ring import Ring

# Elements of a tile of the fast weight, and of the ring's keys or values: what fits in a program's registers.
FAST_WEIGHT_TILE = 8192
RING_TILE = 4096


@triton.jit
def _unit_silu(x):
    x = x * tl.sigmoid(x)
    return x / tl.sqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def _read_kv(
    query, key, value, cos, sin, query_row, ring_key, ring_value, slot, count,
    L: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Softmax over the visible slots by distance from the new token, which comes first and from registers."""
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    if cos is not None:
        # Rotating the query forward by d is rotating the key back by d; its partner in a pair has the sign of the turn.
        partner = tl.load(query_row + (i + K // 2) % K, mask=i < K, other=0).to(query.dtype)
        partner = tl.where(i < K // 2, -partner, partner)
    highest = tl.sum(query * key, 0) * SCALE
    total = highest * 0 + 1
    read = value
    for first in range(1, count, BLOCK_L):
        distance = first + tl.arange(0, BLOCK_L)
        seen = distance < count
        older = slot - distance
        older = tl.where(older < 0, older + L, older).to(tl.int64)
        mask = seen[:, None] & (i < K)[None, :]
        keys = tl.load(ring_key + older[:, None] * (H * K) + i[None, :], mask=mask, other=0).to(query.dtype)
        if cos is not None:
            angle = distance[:, None] * (K // 2) + (i % (K // 2))[None, :]
            turned = query[None, :] * tl.load(cos + angle, mask=mask, other=0)
            turned += partner[None, :] * tl.load(sin + angle, mask=mask, other=0)
            score = tl.sum(keys * turned, 1) * SCALE
        else:
            score = tl.sum(keys * query[None, :], 1) * SCALE
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(highest - higher)
        mask = seen[:, None] & (j < V)[None, :]
        values = tl.load(ring_value + older[:, None] * (H * V) + j[None, :], mask=mask, other=0).to(query.dtype)
        read = read * shrink + tl.sum(weight[:, None] * values, 0)
        total = total * shrink + tl.sum(weight, 0)
        highest = higher
    return read / total


@triton.jit
def _write_and_read_fw(
    fast_weight, query, key, value_row, written, beta, decay,
    WRITES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The read [BLOCK_V] of features of the query after the delta write of features of the key, by column blocks."""
    i = tl.arange(0, BLOCK_K)
    blocks = tl.arange(0, BLOCK_V // BLOCK_C)
    read = tl.zeros((BLOCK_V // BLOCK_C, BLOCK_C), dtype=query.dtype)
    for block in range((V + BLOCK_C - 1) // BLOCK_C):
        j = block * BLOCK_C + tl.arange(0, BLOCK_C)
        tile = fast_weight + i[:, None] * V + j[None, :]
        mask = (i < K)[:, None] & (j < V)[None, :]
        state = tl.load(tile, mask=mask, other=0)
        if WRITES:
            state = state * decay
            value = tl.where(written, tl.load(value_row + j, mask=j < V, other=0).to(query.dtype), 0.0)
            correction = beta * (value - tl.sum(key[:, None] * state, 0))
            state += key[:, None] * correction[None, :]
            tl.store(tile, state, mask=mask)
        columns = tl.sum(query[:, None] * state, 0) * SCALE
        read = tl.where(blocks[:, None] == block, columns[None, :], read)
    return tl.reshape(read, (BLOCK_V,))


@triton.jit
def _mix(fw_read, kv_read, mixer_input, n, h, j, MIXER: tl.constexpr, H: tl.constexpr, V: tl.constexpr):
    if MIXER == "sum":
        mixed = fw_read + kv_read
    elif MIXER == "static_scalar":
        fw = tl.load(mixer_input).to(fw_read.dtype)
        kv = tl.load(mixer_input + 1).to(fw_read.dtype)
        mixed = fw * fw_read + kv * kv_read
    elif MIXER == "dynamic_scalar":
        fw = tl.sigmoid(tl.load(mixer_input + n * 2 * H + h).to(fw_read.dtype))
        kv = tl.sigmoid(tl.load(mixer_input + n * 2 * H + H + h).to(fw_read.dtype))
        mixed = fw * fw_read + kv * kv_read
    elif MIXER == "dynamic_vector":
        fw = tl.sigmoid(tl.load(mixer_input + (n * H + h) * V + j, mask=j < V, other=0).to(fw_read.dtype))
        mixed = kv_read + fw * (fw_read - kv_read)
    else:
        row = mixer_input + (n * H + h) * 2 * V + j
        fw = tl.sigmoid(tl.load(row, mask=j < V, other=0).to(fw_read.dtype))
        kv = tl.sigmoid(tl.load(row + V, mask=j < V, other=0).to(fw_read.dtype))
        mixed = fw * fw_read + kv * kv_read
    return mixed


@triton.jit
def _step(
    query, key, value, position, beta, log_decay, mixer_input, norm_weight, cos, sin,
    fast_weight, ring_key, ring_value, ring_beta, ring_log_decay, output,
    query_stride, key_stride, value_stride,
    L: tl.constexpr, WINDOW: tl.constexpr, DELAY: tl.constexpr, ANCHORED: tl.constexpr, MIXER: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    query += n * query_stride + h * K
    key += n * key_stride + h * K
    value += n * value_stride + h * V
    past = tl.load(position + n)
    slot = past % L
    new_query = tl.load(query + i, mask=i < K, other=0).to(WIDE)
    given_key = tl.load(key + i, mask=i < K, other=0)
    new_key = given_key.to(WIDE)
    if ring_key is not None:
        given_value = tl.load(value + j, mask=j < V, other=0)
        ring_key += n * L * H * K + h * K
        ring_value += n * L * H * V + h * V
        tl.store(ring_key + slot * (H * K) + i, given_key, mask=i < K)
        tl.store(ring_value + slot * (H * V) + j, given_value, mask=j < V)
        count = past % WINDOW + 1 if ANCHORED else tl.minimum(past + 1, WINDOW)
        kv_read = _read_kv(
            new_query, new_key, given_value.to(WIDE), cos, sin, query, ring_key, ring_value,
            slot.to(tl.int32), count.to(tl.int32),
            L, H, K, V, SCALE, BLOCK_K, BLOCK_V, BLOCK_L,
        )  # fmt: skip
    if ring_beta is not None:
        tl.store(ring_beta + (n * L + slot) * H + h, tl.load(beta + n * H + h))
    if ring_log_decay is not None:
        tl.store(ring_log_decay + (n * L + slot) * H + h, tl.load(log_decay + n * H + h))
    if fast_weight is not None:
        written = past >= DELAY
        if DELAY > 0:
            older = (past + L - DELAY) % L
            new_key = tl.load(ring_key + older * (H * K) + i, mask=i < K, other=0).to(WIDE)
            new_key = tl.where(written, new_key, 0.0)
            value = ring_value + older * (H * V)
        strength = tl.where(written, tl.load(beta + n * H + h).to(WIDE), 0.0)
        decay = strength * 0 + 1
        if log_decay is not None:
            decay = tl.exp(tl.load(log_decay + n * H + h).to(WIDE))
        fw_read = _write_and_read_fw(
            fast_weight + (n * H + h) * K * V, _unit_silu(new_query), _unit_silu(new_key), value, written, strength,
            decay, not ANCHORED, K, V, SCALE, BLOCK_K, BLOCK_V, BLOCK_C,
        )  # fmt: skip
    if fast_weight is None:
        mixed = kv_read
    elif ring_key is None:
        mixed = fw_read
    else:
        mixed = _mix(fw_read, kv_read, mixer_input, n, h, j, MIXER, H, V)
    if norm_weight is not None:
        mixed = mixed / tl.sqrt(tl.sum(mixed * mixed, 0) / V + EPS)
        mixed *= tl.load(norm_weight + j, mask=j < V, other=0).to(WIDE)
    tl.store(output + (n * H + h) * V + j, mixed, mask=j < V)


def hybrid_step_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    gates: tuple[Tensor, Tensor | None] | None,
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
    (documents, heads, key_dim), value_dim = query.shape, value.shape[-1]
    query, key, value = (_by_rows(x) for x in (query, key, value))
    beta, log_decay = (None if x is None else x.contiguous() for x in gates or (None, None))
    cos, sin = angles or (None, None)
    wide = state_dtype(value.dtype)
    # A device rounds to nearest; the interpreter on a CPU would cut bits off.
    output = torch.empty(value.shape, dtype=value.dtype if value.is_cuda else wide, device=value.device)
    slots = 1 if ring is None else ring.key.shape[1]
    blocks = _blocks(slots, key_dim, value_dim)
    with on_device(query):
        _step[(documents, heads)](
            query, key, value, position.contiguous(), beta, log_decay,
            None if mixer_input is None else mixer_input.contiguous(), norm_weight, cos, sin,
            fast_weight, *(ring or (None, None, None, None)), output,
            query.stride(0), key.stride(0), value.stride(0),
            L=slots, WINDOW=window or 1, DELAY=delay, ANCHORED=anchored, MIXER=mixer,
            H=heads, K=key_dim, V=value_dim, SCALE=key_dim**-0.5, EPS=eps,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            num_warps=8 if blocks["BLOCK_K"] * blocks["BLOCK_C"] > FAST_WEIGHT_TILE // 2 else 4,
            **blocks,
        )  # fmt: skip
    return output.to(value.dtype)


def _by_rows(x: Tensor) -> Tensor:
    """x [N, H, dim] whose documents may lie apart, but each in one piece."""
    return x if x[0].is_contiguous() else x.contiguous()


def _blocks(slots: int, key_dim: int, value_dim: int) -> dict[str, Any]:
    """Tiles: powers of two, so that others are masked."""
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    rows = max(1, RING_TILE // max(block_k, block_v))
    return {
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_L": min(triton.next_power_of_2(slots), rows),
        "BLOCK_C": min(block_v, max(1, FAST_WEIGHT_TILE // block_k)),
    }
