"""The chunk-parallel form of every fast weight, forward and backward, in segments that stay in the processor's cache.

Work inside a tile is matrix products; only tile states are passed on in sequence. With β-weighted keys b = diag(β) K,
a tile that is entered with the state M stores the errors

    E = (I + N)⁻¹ (V − K M),   N = strictly lower part of K bᵀ      (E = V without correction)

and with P = lower part of Q bᵀ, read = s (Q M + P E), M ← M + bᵀ E. A running log-decay G turns K M and Q M into
e^G K M and e^G Q M, b on leaving into e^{G_C − G} b, and weighs N and P by e^{G_t − G_s}. Chunk reads see the state at
their unit's start, and in P the writes before their own period only.

The backward pass needs no inverse of its own: with Y the gradient of V − K M, that of N is −Y Eᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.blocks import Scratch, empty, needs_grad, rows_per_segment
from hqlt.ops.decay import Decay
from hqlt.ops.features import unit_silu_gradient, unit_silu_of
from hqlt.ops.precision import full_precision
from hqlt.ops.tiles import Tiles, make_tiles
from hqlt.ops.triangular import unit_lower_inverse


def choose_tile(key_dim: int, gradients: bool) -> int:
    """Tokens in a tile where the caller leaves it open.

    Long tiles cost more per token, short ones more steps, and for gradients more memory: a state is kept for each.
    """
    return 16 if key_dim < 48 else 32 if key_dim < 128 or not gradients else 64


@full_precision
def chunked(
    correct: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    borders: list[int] | None,
    period: int | None,
    chunk_size: int | None,
    scale: float,
    features: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write and read a fast weight tile by tile. Differentiable once.

    Args:
        correct: write the error of what the state returns for a key (delta rules) instead of the value.
        query, key, value, beta, log_decay: [B, T, H, …].
        state: [N, H, K, V] in the state dtype.
        borders: of packed documents, or None.
        period: of chunk reads, or None.
        chunk_size: tokens in a tile; None chooses.
        scale: of the read.
        features: take :func:`hqlt.ops.unit_silu` of query and key, in the cache: neither is stored.

    Returns:
        read [B, T, H, V] in the dtype of ``value`` and the final state [N, H, K, V].
    """
    size = chunk_size or choose_tile(query.shape[-1], needs_grad(query, key, value, beta, log_decay, state))
    tiles = make_tiles(query, borders, size, period)
    plan = _Plan(tiles, query.shape[2], scale, period, correct, features)
    read, final = _Chunked.apply(query, key, value, beta, log_decay, state, plan)  # type: ignore[no-untyped-call]
    return read, final


@dataclass(frozen=True)
class _Plan:
    tiles: Tiles
    heads: int
    scale: float
    period: int | None
    correct: bool
    features: bool

    @property
    def tile(self) -> int:
        return self.tiles.grid.tile

    @property
    def unit(self) -> int:
        return self.tiles.grid.tiles_per_unit

    @property
    def sees_own_tile(self) -> bool:
        """Whether a query reads any write of its own tile."""
        return self.period is None or (self.unit == 1 and self.period < self.tile)

    def segments(self, state: Tensor) -> list[_Segment]:
        """Runs of scan steps to work on together."""
        row = self.heads * self.tile * max(state.shape[-2:]) * state.element_size()
        limit = rows_per_segment(row, state.device)
        segments = []
        for steps in self.tiles.segments(limit):
            places = self.tiles.places(steps)
            start = places[0].start
            local = [slice((p.start - start) * self.heads, (p.stop - start) * self.heads) for p in places]
            segments.append(_Segment(steps, local, start * self.heads))
        return segments


@dataclass(frozen=True)
class _Segment:
    """Scan steps worked on together; heads are flattened into the tiles.

    Attributes:
        steps: of the scan.
        places: where the tiles of each step lie in the segment.
        start: where the segment lies among all tiles.
    """

    steps: slice
    places: list[slice]
    start: int

    @property
    def count(self) -> int:
        stop: int = self.places[-1].stop
        return stop

    def of(self, x: Tensor) -> Tensor:
        """The part of a tensor over all tiles that belongs to this segment."""
        return x[self.start : self.start + self.count]

    def steps_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """The part of each step of a tensor over the segment's tiles."""
        parts: tuple[Tensor, ...] = x.split([place.stop - place.start for place in self.places])
        return parts

    def reads(self, unit: int) -> list[tuple[slice, slice]]:
        """Which queries read which states: those on entry to the first step of their unit."""
        if unit == 1:
            return [(slice(0, self.count), slice(0, self.count))]
        firsts = [self.places[step - step % unit].start for step in range(len(self.places))]
        return [
            (place, slice(first, first + place.stop - place.start))
            for place, first in zip(self.places, firsts, strict=True)
        ]


class _Inputs:
    """The tokens of a segment in tiles, and what follows from them without the state."""

    def __init__(
        self, plan: _Plan, segment: _Segment, scratch: Scratch, tokens: tuple[Tensor, Tensor, Tensor, Tensor | None]
    ) -> None:
        self.plan, self.segment, self.scratch = plan, segment, scratch
        query, key, beta, log_decay = tokens
        self._raw: dict[str, tuple[Tensor, Tensor]] = {}
        self.q, self.k, self.b = self.feature("query", query), self.feature("key", key), self.load("beta", beta)
        self.weighted = torch.mul(self.k, self.b.unsqueeze(-1), out=self.like(self.k, "weighted"))
        self.decay: Decay | None = None
        self.q_in, self.k_in, self.k_out = self.q, self.k, self.weighted
        if log_decay is not None:
            causal = torch.ones(plan.tile, plan.tile, dtype=torch.bool, device=key.device).tril_()
            self.decay = Decay(self.load("log_decay", log_decay), plan.period, plan.sees_own_tile, causal)
            self.k_in = torch.mul(self.k, self.decay.entering, out=self.like(self.k, "k_in"))
            self.k_out = torch.mul(self.weighted, self.decay.leaving, out=self.like(self.k, "k_out"))
            if self.decay.query is not None:
                self.q_in = torch.mul(self.q, self.decay.query, out=self.like(self.q, "q_in"))

    def load(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Tokens [B, T, H, …] of the segment, [tiles · heads, C, …], in ``out`` or in scratch memory."""
        if out is None:
            out = self.scratch(name, self.segment.count, self.plan.tile, *x.shape[3:])
        self.plan.tiles.load(x, self.segment.steps, out.unflatten(0, (-1, self.plan.heads)))
        return out

    def feature(self, name: str, x: Tensor) -> Tensor:
        """What the fast weight sees of queries or keys."""
        raw = self.load(name, x)
        if not self.plan.features:
            return raw
        feature = self.like(raw, f"feature of {name}")
        self._raw[name] = raw, unit_silu_of(raw, feature)
        return feature

    def feature_gradient(self, name: str, feature: Tensor, grad: Tensor) -> Tensor:
        """Gradient of queries or keys, in place of that of their features."""
        if name in self._raw:
            raw, inverse = self._raw[name]
            unit_silu_gradient(grad, raw, feature, inverse)
        return grad

    def like(self, x: Tensor, name: str) -> Tensor:
        return self.scratch(name, *x.shape)

    def lower(self, out: Tensor) -> Tensor:
        """N: what each token's key recalls of the tile's earlier writes."""
        torch.bmm(self.k, self.weighted.mT, out=out)
        if self.decay is not None:
            out.mul_(self.decay.between)
        return out.tril_(-1)

    def weights(self, out: Tensor) -> Tensor:
        """P: what each query reads of the tile's writes."""
        torch.bmm(self.q, self.weighted.mT, out=out)
        return out.mul_(self.decay.seen) if self.decay is not None else self.mask_weights(out)

    def mask_weights(self, x: Tensor) -> Tensor:
        """0 where a query does not see a write of its tile."""
        if self.plan.period is None:
            return x.tril_()
        block = torch.arange(self.plan.tile, device=x.device) // self.plan.period
        return x.masked_fill_(block[:, None] <= block[None, :], 0)


def _forward_segment(
    inputs: _Inputs, value: Tensor, current: Tensor, room: Callable[[str, tuple[int, ...]], Tensor], keep: bool
) -> Tensor:
    """Advance ``current`` [documents · heads, K, V] in place over a segment; its reads in tiles, [n, C, V].

    ``keep``: the state on entry to each tile, in the room of that name, for the backward pass.
    """
    plan, segment, scratch = inputs.plan, inputs.segment, inputs.scratch
    square, rows = (plan.tile, plan.tile), (plan.tile, current.shape[-1])
    errors, starts = room("errors", rows), None
    if plan.unit > 1 or keep:
        starts = room("starts", tuple(current.shape[1:]))
    reads = scratch("reads", segment.count, *rows)
    values = inputs.load("value", value, None if plan.correct else errors)
    if plan.correct:
        lower = inputs.lower(scratch("lower", segment.count, *square))
        inverse = room("inverse", square).copy_(unit_lower_inverse(lower))
    step_errors, step_keys, step_reads, step_queries = map(
        segment.steps_of, (errors, inputs.k_out.mT, reads, inputs.q_in)
    )
    step_starts = [] if starts is None else segment.steps_of(starts)
    recalls = [segment.steps_of(x) for x in (values, inputs.k_in, inverse)] if plan.correct else []
    wholes = None if inputs.decay is None else segment.steps_of(inputs.decay.whole)
    for n, error in enumerate(step_errors):
        # Documents that have ended come last and keep their final state.
        now = current[: error.shape[0]]
        if step_starts:
            step_starts[n].copy_(now)
        if plan.unit == 1:
            torch.baddbmm(step_reads[n], step_queries[n], now, beta=0, alpha=plan.scale, out=step_reads[n])
        if recalls:
            value_in, key_in, solve = (x[n] for x in recalls)
            torch.bmm(solve, value_in.baddbmm_(key_in, now, alpha=-1), out=error)
        if wholes is not None:
            now.mul_(wholes[n])
        now.baddbmm_(step_keys[n], error)
    if starts is not None and plan.unit > 1:
        for place, source in segment.reads(plan.unit):
            read = reads[place]
            torch.baddbmm(read, inputs.q_in[place], starts[source], beta=0, alpha=plan.scale, out=read)
    if plan.sees_own_tile:
        reads.baddbmm_(inputs.weights(scratch("weights", segment.count, *square)), errors, alpha=plan.scale)
    return reads


def _backward_segment(
    inputs: _Inputs,
    grad_read: Tensor,
    grad_state: Tensor,
    saved: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Take ``grad_state`` in place from the end of a segment to its start; the gradients of its tokens, in tiles."""
    plan, segment, scratch, decay = inputs.plan, inputs.segment, inputs.scratch, inputs.decay
    starts, errors, inverse = saved["starts"], saved["errors"], saved.get("inverse")
    weights = None
    if plan.sees_own_tile:
        # Computing them again costs less than the memory to keep them.
        weights = inputs.weights(scratch("weights", segment.count, plan.tile, plan.tile))
    grad_reads = inputs.load("grad_read", grad_read).mul_(plan.scale)
    grad_errors = scratch("grad_errors", *errors.shape)
    if weights is None:
        grad_errors.zero_()
    else:
        torch.bmm(weights.mT, grad_reads, out=grad_errors)
    grad_values = grad_errors if inverse is None else scratch("grad_values", *errors.shape)
    grad_k_out = inputs.like(inputs.k, "grad_k_out")
    grad_whole = grad_state.new_empty(segment.count)
    pending = torch.zeros_like(grad_state) if plan.unit > 1 else None
    of_steps = segment.steps_of
    writes = [of_steps(x) for x in (errors, grad_k_out, grad_errors, inputs.k_out)]
    solves = [] if inverse is None else [of_steps(x) for x in (inverse.mT, grad_values, inputs.k_in.mT)]
    decays = [] if decay is None else [of_steps(x) for x in (starts, grad_whole, decay.whole)]
    queries, upper = of_steps(inputs.q_in.mT), of_steps(grad_reads)
    for step in reversed(range(len(segment.places))):
        error, to_key, to_error, key = (x[step] for x in writes)
        now = grad_state[: error.shape[0]]
        torch.bmm(error, now.mT, out=to_key)
        to_error.baddbmm_(key, now)
        if decays:
            start, to_whole, whole = (x[step] for x in decays)
            dot = torch.bmm(now.flatten(1).unsqueeze(1), start.flatten(1).unsqueeze(2))
            to_whole.copy_((dot * whole).flatten())
            now.mul_(whole)
        if solves:
            solve, to_value, key_in = (x[step] for x in solves)
            torch.bmm(solve, to_error, out=to_value)
            now.baddbmm_(key_in, to_value, alpha=-1)
        target = now if pending is None else pending[: now.shape[0]]
        target.baddbmm_(queries[step], upper[step])
        if pending is not None and step % plan.unit == 0:
            now.add_(target)
            pending.zero_()
    grad_q, grad_k = inputs.like(inputs.q, "grad_q"), inputs.like(inputs.k, "grad_k")
    for place, source in segment.reads(plan.unit):
        torch.bmm(grad_reads[place], starts[source].mT, out=grad_q[place])
    grad_weights = grad_lower = None
    if weights is not None:
        grad_weights = inputs.mask_weights(torch.bmm(grad_reads, errors.mT, out=inputs.like(weights, "grad_weights")))
    if inverse is None:
        grad_k.zero_()
    else:
        torch.baddbmm(grad_k, grad_values, starts.mT, beta=0, alpha=-1, out=grad_k)
        grad_lower = inputs.like(inverse, "grad_lower")
        torch.baddbmm(grad_lower, grad_values, errors.mT, beta=0, alpha=-1, out=grad_lower).tril_(-1)
    if decay is not None:
        _backward_decay(inputs, decay, weights, grad_q, grad_k, grad_k_out, grad_weights, grad_lower, grad_whole)
    grad_weighted = grad_k_out
    if grad_weights is not None:
        grad_q.baddbmm_(grad_weights, inputs.weighted)
        grad_weighted.baddbmm_(grad_weights.mT, inputs.q)
    if grad_lower is not None:
        grad_k.baddbmm_(grad_lower, inputs.weighted)
        grad_weighted.baddbmm_(grad_lower.mT, inputs.k)
    grad_k.addcmul_(grad_weighted, inputs.b.unsqueeze(-1))
    grad_b = grad_weighted.mul_(inputs.k).sum(-1)
    grad_q = inputs.feature_gradient("query", inputs.q, grad_q)
    grad_k = inputs.feature_gradient("key", inputs.k, grad_k)
    grads = {"query": grad_q, "key": grad_k, "value": grad_values, "beta": grad_b}
    return grads if decay is None else {**grads, "log_decay": decay.result()}


def _backward_decay(
    inputs: _Inputs,
    decay: Decay,
    weights: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_k_out: Tensor,
    grad_weights: Tensor | None,
    grad_lower: Tensor | None,
    grad_whole: Tensor,
) -> None:
    """Gradients of decayed queries, keys and products → of the undecayed, in place, and of the decay itself."""
    if grad_weights is not None and weights is not None:
        decay.add_weights(weights * grad_weights, query=True)
        grad_weights.mul_(decay.seen)
    if grad_lower is not None:
        decay.add_weights(inputs.lower(inputs.like(grad_lower, "lower")).mul_(grad_lower))
        grad_lower.mul_(decay.between)
    if decay.query is not None:
        decay.add_entering((grad_q * inputs.q_in).sum(-1), query=True)
        grad_q.mul_(decay.query)
    decay.add_entering((grad_k * inputs.k_in).sum(-1))
    grad_k.mul_(decay.entering)
    decay.add_leaving((grad_k_out * inputs.k_out).sum(-1), grad_whole)
    grad_k_out.mul_(decay.leaving)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        scratch, segments, tile = Scratch(state), plan.segments(state), plan.tile
        total = segments[-1].start + segments[-1].count
        saved: dict[str, Tensor] = {}
        if any(ctx.needs_input_grad):
            saved = {
                "starts": state.new_empty(total, *state.shape[2:]),
                "errors": state.new_empty(total, tile, state.shape[3]),
            }
            if plan.correct:
                saved["inverse"] = state.new_empty(total, tile, tile)
        read = empty(value)
        current = plan.tiles.sort_documents(state).flatten(0, 1).clone(memory_format=torch.contiguous_format)
        for segment in segments:

            def room(name: str, shape: tuple[int, ...], segment: _Segment = segment) -> Tensor:
                return segment.of(saved[name]) if name in saved else scratch(name, segment.count, *shape)

            inputs = _Inputs(plan, segment, scratch, (query, key, beta, log_decay))
            reads = _forward_segment(inputs, value, current, room, bool(saved))
            plan.tiles.store(reads.unflatten(0, (-1, plan.heads)), segment.steps, read)
        ctx.plan, ctx.segments, ctx.names = plan, segments, tuple(saved)
        ctx.save_for_backward(query, key, beta, log_decay, *saved.values())
        return read, plan.tiles.unsort_documents(current.unflatten(0, (-1, plan.heads)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad_read: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        # Unpacked once: activation checkpointing computes them again each time.
        query, key, beta, log_decay, *rest = ctx.saved_tensors
        saved = dict(zip(ctx.names, rest, strict=True))
        tokens = {"query": query, "key": key, "value": grad_read, "beta": beta, "log_decay": log_decay}
        grads = {name: empty(x) for name, x in tokens.items() if x is not None}
        scratch = Scratch(grad_final)
        current = plan.tiles.sort_documents(grad_final).flatten(0, 1).clone(memory_format=torch.contiguous_format)
        for segment in reversed(ctx.segments):
            inputs = _Inputs(plan, segment, scratch, (query, key, beta, log_decay))
            kept = {name: segment.of(x) for name, x in saved.items()}
            for name, grad in _backward_segment(inputs, grad_read, current, kept).items():
                plan.tiles.store(grad.unflatten(0, (-1, plan.heads)), segment.steps, grads[name])
        state = plan.tiles.unsort_documents(current.unflatten(0, (-1, plan.heads)))
        return *(grads.get(name) for name in tokens), state, None
