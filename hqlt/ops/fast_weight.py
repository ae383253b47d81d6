"""What every fast-weight op shares: the recurrence over tokens and the chunk-parallel form.

All rules have the form M ← e^g M + k uᵀ, read Mᵀq, where u is the value to store: the value itself (linear
attention) or the correction of what M returns for k (delta rules). A read takes the state after the token's own write
(``reads="token"``) or the state at the last multiple of ``period`` (``reads="chunk"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.ops.checks import (
    check_chunk_size,
    check_floats,
    check_qkv,
    check_reads,
    check_shape,
    check_state,
    documents,
    state_dtype,
)
from hqlt.ops.tiles import Tiles, make_tiles

Op = TypeVar("Op", bound=Callable[..., Any])
Write = Callable[..., Tensor]
Rule = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


def check_fast_weight(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reads: str,
    period: int | None,
    chunk_size: int,
    extra_columns: int = 0,
) -> tuple[list[int] | None, int | None]:
    """Check the arguments of a fast-weight op; the document borders and the read period."""
    check_qkv(query, key, value)
    check_shape("key", key, query.shape, "[B, T, H, K]")
    batch, length, heads, key_dim = query.shape
    for name, gate in gates.items():
        # A gate may be more precise than the tokens, not less.
        exact = isinstance(gate, Tensor) and gate.dtype == state_dtype(query.dtype)
        check_floats(**({name: gate} if exact else {"query": query, name: gate}))
        check_shape(name, gate, (batch, length, heads), "[B, T, H]")
    borders = documents(cu_seqlens, batch, length)
    count = batch if borders is None else len(borders) - 1
    check_state(initial_state, (count, heads, key_dim, value.shape[-1] + extra_columns), query)
    check_chunk_size(chunk_size)
    return borders, check_reads(reads, period)


def first_state(initial_state: Tensor | None, query: Tensor, columns: int, borders: list[int] | None) -> Tensor:
    """The given state, or zeros [N, H, K, columns] in the state dtype."""
    if initial_state is not None:
        return initial_state
    count = query.shape[0] if borders is None else len(borders) - 1
    shape = (count, query.shape[2], query.shape[3], columns)
    return torch.zeros(shape, dtype=state_dtype(query.dtype), device=query.device)


def full_precision(function: Op) -> Op:
    """Keep autocast out: a fast weight accumulates, so its products stay in the state dtype."""

    @wraps(function)
    def wrapped(rule: Any, query: Tensor, *arguments: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            return function(rule, query, *arguments)

    return cast(Op, wrapped)


@full_precision
def recurrence(
    write: Write,
    query: Tensor,
    tokens: Sequence[Tensor],
    state: Tensor,
    borders: list[int] | None,
    period: int | None,
) -> tuple[Tensor, Tensor]:
    """Token by token: write(state, *token) → state, read = stateᵀ q. The definition of every fast-weight op.

    Args:
        write: the update rule; takes the state [N, H, K, V] and one entry [N, H, …] of each of ``tokens``.
        query: [B, T, H, K], scaled, in the state dtype.
        tokens: tensors [B, T, H, …] that the rule reads.
        state: [N, H, K, V] in the state dtype.
        borders: of packed documents, or None.
        period: of chunk reads, or None.

    Returns:
        read [B, T, H, V] in the state dtype and the final state [N, H, K, V].
    """
    if borders is not None:
        spans = [slice(a, b) for a, b in pairwise(borders)]
        parts = [
            recurrence(write, query[:, span], [x[:, span] for x in tokens], state[n : n + 1], None, period)
            for n, span in enumerate(spans)
        ]
        return torch.cat([read for read, _ in parts], 1), torch.cat([final for _, final in parts], 0)
    tokens = [x.to(state.dtype) for x in tokens]
    held, reads = state, []
    for t in range(query.shape[1]):
        if period is not None and t % period == 0:
            held = state
        state = write(state, *[x[:, t] for x in tokens])
        source = state if period is None else held
        reads.append((query[:, t].unsqueeze(-2) @ source).squeeze(-2))
    return torch.stack(reads, 1), state


@full_precision
def chunked(
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    borders: list[int] | None,
    period: int | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form: work inside a tile is matrix products, only tile states are passed on in sequence.

    With G the running log-decay inside a tile, ``rule`` returns what a tile would store from a zero state, U, and
    how much of the entering state it takes back, W (None: nothing). Then, per tile with entering state M,

        U' = U − W M,   M ← e^{G_C} M + Σ_s e^{G_C−G_s} k_s u'_sᵀ,
        read_t = e^{G_t} Mᵀq_t + Σ_{s≤t} e^{G_t−G_s} (q_t·k_s) u'_s.

    Chunk reads sum over s before the last period border b instead, with G_b in place of G_t.

    Args:
        rule: (key, value, beta, decays e^{G_t−G_s} or None, G or None), tiles [n, H, C, …] → (U, W).
        query, key, value, beta, log_decay: [B, T, H, …]; the query is scaled and in the state dtype.
        state: [N, H, K, V] in the state dtype.

    Returns:
        read [B, T, H, V] in the state dtype and the final state [N, H, K, V].
    """
    tiles = make_tiles(query, borders, chunk_size, period)
    q, k, v, b = (tiles.split(x.to(state.dtype)) for x in (query, key, value, beta))
    running = None if log_decay is None else tiles.split(log_decay.to(state.dtype)).cumsum(-1)
    causal = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    stored, taken = rule(k, v, b, None if running is None else _decays(running, running, causal), running)
    keys, carried = k, None
    if running is not None:
        keys = k * (running[..., -1:] - running).exp().unsqueeze(-1)
        carried = running[..., -1, None, None].exp()
    starts, stored, final = _scan(tiles, keys, stored, taken, carried, state)
    read = _read(tiles, q, k, stored, starts, running, causal, period)
    return tiles.merge(read), final


def _scan(
    tiles: Tiles, keys: Tensor, stored: Tensor, taken: Tensor | None, carried: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States on entry to each tile [n, H, K, V], what each tile stores, and the final state of each document."""
    state = tiles.sort_documents(state)
    starts, corrected, finished = [], [], []
    key_steps, stored_steps = keys.mT.split(tiles.alive), stored.split(tiles.alive)
    taken_steps = None if taken is None else taken.split(tiles.alive)
    carried_steps = None if carried is None else carried.split(tiles.alive)
    for step, alive in enumerate(tiles.alive):
        if alive < state.shape[0]:
            finished.append(state[alive:])
            state = state[:alive]
        starts.append(state)
        u = stored_steps[step] if taken_steps is None else stored_steps[step] - taken_steps[step] @ state
        corrected.append(u)
        state = (state if carried_steps is None else carried_steps[step] * state) + key_steps[step] @ u
    final = tiles.unsort_documents(torch.cat([state, *reversed(finished)]))
    return torch.cat(starts), torch.cat(corrected), final


def _read(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    stored: Tensor,
    starts: Tensor,
    running: Tensor | None,
    causal: Tensor,
    period: int | None,
) -> Tensor:
    """Reads of all tiles: from the state on entry and from what the tile itself has stored."""
    size = q.shape[-2]
    if period is None:
        visible, border = causal, running
    elif tiles.grid.tiles_per_unit > 1 or period >= size:
        return q @ _unit_starts(tiles, starts)
    else:
        block = torch.arange(size, device=q.device) // period
        visible = block[:, None] > block[None, :]
        # Running log-decay at the last border: that of the token before it, 0 at the start of the tile.
        border = None if running is None else F.pad(running, (1, 0))[..., block * period]
    scores = q @ k.mT
    if running is None or border is None:
        return q @ starts + scores.masked_fill(~visible, 0.0) @ stored
    return (q * border.exp().unsqueeze(-1)) @ starts + (scores * _decays(border, running, visible)) @ stored


def _unit_starts(tiles: Tiles, starts: Tensor) -> Tensor:
    """For each tile the state on entry to its unit."""
    per_unit = tiles.grid.tiles_per_unit
    if per_unit == 1:
        return starts
    steps = list(starts.split(tiles.alive))
    return torch.cat([steps[j - j % per_unit][: len(steps[j])] for j in range(len(steps))])


def _decays(at: Tensor, since: Tensor, visible: Tensor) -> Tensor:
    """e^{G_t − G_s} where s is visible from t, else 0; masked before the exponential so that nothing overflows."""
    return (at.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(~visible, float("-inf")).exp()
