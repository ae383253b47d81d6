"""What every fast-weight op shares: the recurrence over tokens and the chunk-parallel form.

All rules have the form M ← e^g M + k uᵀ, read Mᵀq, where u is the value to store: the value itself (linear
attention) or the correction of what M returns for k (delta rules). A read takes the state after the token's own write
(``reads="token"``) or the state at the last multiple of ``period`` (``reads="chunk"``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

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
from hqlt.ops.precision import full_precision
from hqlt.ops.scan import Steps, scan
from hqlt.ops.tiles import Tiles, make_tiles

Write = Callable[..., Tensor]
Rule = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
    rule: Rule | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    borders: list[int] | None,
    period: int | None,
    chunk_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel form: work inside a tile is matrix products, only tile states are passed on in sequence.

    With G the running log-decay inside a tile and M the state on entry, the tile stores U = S (V − e^G K M), where
    ``rule`` gives S, or U = diag(β) V without a rule, and

        read_t = e^{G_t} Mᵀq_t + Σ_{s≤t} e^{G_t−G_s} (q_t·k_s) u_s,   M ← e^{G_C} M + Σ_s e^{G_C−G_s} k_s u_sᵀ.

    Chunk reads sum over s before the last period border b instead, with G_b in place of G_t.

    Args:
        rule: (key, beta, decays e^{G_t−G_s} or None), tiles [n, C, …] → S [n, C, C].
        query, key, value, beta, log_decay: [B, T, H, …].
        state: [N, H, K, V] in the state dtype.
        scale: of the read.

    Returns:
        read [B, T, H, V] and the final state [N, H, K, V], both in the state dtype.
    """
    tiles = make_tiles(query, borders, chunk_size, period)
    heads = query.shape[2]
    q, k, v, b = (tiles.split(x.to(state.dtype)).flatten(0, 1) for x in (query, key, value, beta))
    size = q.shape[-2]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril_()
    running = decay = entering = None
    leaving, decays = k, None
    if log_decay is not None:
        running = tiles.split(log_decay.to(state.dtype)).flatten(0, 1).cumsum(-1)
        decays = _decays(running, running, causal)
        entering = k * running.exp().unsqueeze(-1)
        leaving = k * (running[:, -1:] - running).exp().unsqueeze(-1)
        decay = running[:, -1, None, None].exp()
    solve = None if rule is None else rule(k, b, decays)
    stored = v * b.unsqueeze(-1) if rule is None else v
    q, inner = _inner(tiles, q, k, running, decays, causal, period)
    steps = Steps([alive * heads for alive in tiles.alive], tiles.grid.tiles_per_unit)
    first = tiles.sort_documents(state).flatten(0, 1)
    read, final = scan(q, inner, entering, solve, leaving, stored, decay, first, steps, scale)
    return tiles.merge(read.unflatten(0, (-1, heads))), tiles.unsort_documents(final.unflatten(0, (-1, heads)))


def _inner(
    tiles: Tiles,
    q: Tensor,
    k: Tensor,
    running: Tensor | None,
    decays: Tensor | None,
    causal: Tensor,
    period: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The query as the entering state sees it, and its weights of the tile's own writes (None: it sees none)."""
    if period is None:
        scores = q @ k.mT
        if running is None or decays is None:
            return q, scores.tril()
        return q * running.exp().unsqueeze(-1), scores * decays
    size = q.shape[-2]
    if tiles.grid.tiles_per_unit > 1 or period >= size:
        return q, None
    block = torch.arange(size, device=q.device) // period
    visible = block[:, None] > block[None, :]
    scores = q @ k.mT
    if running is None:
        return q, scores.masked_fill(~visible, 0.0)
    # Running log-decay at the last border: that of the token before it, 0 at the start of the tile.
    border = F.pad(running, (1, 0))[:, block * period]
    return q * border.exp().unsqueeze(-1), scores * _decays(border, running, visible)


def _decays(at: Tensor, since: Tensor, visible: Tensor) -> Tensor:
    """e^{G_t − G_s} where s is visible from t, else 0; masked before the exponential so that nothing overflows."""
    return (at.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(~visible, float("-inf")).exp()
