"""The sequential part of a chunk-parallel fast weight, with a hand-written backward pass.

Autograd through the loop over tiles would keep several copies of every state and walk them one small product at a
time. Here the forward pass keeps the state on entry to each tile and what the tile stores, and the backward pass runs
one reverse loop with only the products that depend on the loop inside; all others are batched over tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqlt.ops.precision import full_precision


@dataclass(frozen=True)
class Steps:
    """Tiles in scan order, heads flattened into the batch.

    Attributes:
        rows: documents × heads alive at each scan step, non-increasing; tiles of a step are contiguous.
        unit: scan steps that read the state on entry to the first of them.
    """

    rows: list[int]
    unit: int = 1

    def slices(self) -> list[slice]:
        """Where the tiles of each step lie."""
        out, start = [], 0
        for count in self.rows:
            out.append(slice(start, start + count))
            start += count
        return out

    def unit_starts(self, starts: Tensor) -> Tensor:
        """For each tile the state on entry to its unit."""
        if self.unit == 1:
            return starts
        places = self.slices()
        return torch.cat([starts[places[j - j % self.unit]][:count] for j, count in enumerate(self.rows)])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        inner: Tensor | None,
        key_in: Tensor | None,
        solve: Tensor | None,
        key_out: Tensor,
        value: Tensor,
        decay: Tensor | None,
        state: Tensor,
        steps: Steps,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        starts = value.new_empty(value.shape[0], *state.shape[1:])
        stored = value if solve is None else torch.empty_like(value)
        recalled = key_out if key_in is None else key_in
        residual = None if solve is None else torch.empty_like(value)
        final = torch.empty_like(state)
        places = steps.slices()
        for j, place in enumerate(places):
            rows = steps.rows[j]
            state = state[:rows]
            starts[place] = state
            if solve is not None and residual is not None:
                torch.baddbmm(value[place], recalled[place], state, alpha=-1, out=residual[place])
                torch.bmm(solve[place], residual[place], out=stored[place])
            carried = state if decay is None else state * decay[place]
            state = torch.baddbmm(carried, key_out[place].mT, stored[place])
            alive = steps.rows[j + 1] if j + 1 < len(places) else 0
            final[alive:rows] = state[alive:]
        read = _product(query, steps.unit_starts(starts), scale)
        if inner is not None:
            read.baddbmm_(inner, stored, alpha=scale)
        ctx.steps, ctx.scale = steps, scale
        ctx.save_for_backward(query, inner, key_in, solve, key_out, decay, starts, stored, residual)
        return read, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @full_precision
    def backward(ctx: Any, grad_read: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        query, inner, key_in, solve, key_out, decay, starts, stored, residual = ctx.saved_tensors
        steps: Steps = ctx.steps
        scale: float = ctx.scale
        grad_read = grad_read.contiguous()
        grad_stored = torch.zeros_like(stored) if inner is None else _product(inner.mT, grad_read, scale)
        grad_value = grad_stored if solve is None else torch.empty_like(stored)
        grad_key_out = torch.empty_like(key_out)
        grad_decay = None if decay is None else torch.empty_like(decay)
        recalled = key_out if key_in is None else key_in
        grad_state = grad_final.clone()
        from_reads = torch.zeros_like(grad_state) if steps.unit > 1 else None
        for j, place in reversed(list(enumerate(steps.slices()))):
            rows = steps.rows[j]
            grad = grad_state[:rows]
            torch.bmm(stored[place], grad.mT, out=grad_key_out[place])
            grad_stored[place].baddbmm_(key_out[place], grad)
            if decay is not None and grad_decay is not None:
                grad_decay[place] = (grad * starts[place]).sum((1, 2), keepdim=True)
                grad.mul_(decay[place])
            if solve is not None:
                torch.bmm(solve[place].mT, grad_stored[place], out=grad_value[place])
                grad.baddbmm_(recalled[place].mT, grad_value[place], alpha=-1)
            if from_reads is None:
                grad.baddbmm_(query[place].mT, grad_read[place], alpha=scale)
            else:
                from_reads[:rows].baddbmm_(query[place].mT, grad_read[place], alpha=scale)
                if j % steps.unit == 0:
                    grad.add_(from_reads[:rows])
                    from_reads.zero_()
        grad_query = _product(grad_read, steps.unit_starts(starts).mT, scale)
        grad_inner = None if inner is None else _product(grad_read, stored.mT, scale)
        grad_solve = grad_key_in = None
        if solve is not None:
            grad_solve = torch.bmm(grad_stored, residual.mT)
            if key_in is None:
                grad_key_out.baddbmm_(grad_value, starts.mT, alpha=-1)
            else:
                grad_key_in = torch.bmm(grad_value, starts.mT).neg_()
        return (
            grad_query,
            grad_inner,
            grad_key_in,
            grad_solve,
            grad_key_out,
            grad_value,
            grad_decay,
            grad_state,
            None,
            None,
        )


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left @ right in one pass."""
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def scan(
    query: Tensor,
    inner: Tensor | None,
    key_in: Tensor | None,
    solve: Tensor | None,
    key_out: Tensor,
    value: Tensor,
    decay: Tensor | None,
    state: Tensor,
    steps: Steps,
    scale: float,
) -> tuple[Tensor, Tensor]:
    r"""Pass a fast weight through tiles and read it. With M the state on entry to a tile,

    .. math:: U = \text{solve}\,(\text{value} - \text{key\_in}\,M), \quad
              \text{read} = s\,(\text{query}\,M + \text{inner}\,U), \quad
              M \leftarrow \text{decay}\,M + \text{key\_out}^\top U .

    Args:
        query: [n, C, K], n tiles × heads in scan order.
        inner: weights of the tile's own writes, [n, C, C]; None reads none of them.
        key_in: [n, C, K]; None is ``key_out``.
        solve: [n, C, C]; None stores the value as it is.
        key_out: [n, C, K]. value: [n, C, V]. decay: [n, 1, 1] or None. state: [rows, K, V].
        scale: s.

    Returns:
        read [n, C, V] and the final states [rows, K, V]. Differentiable once.
    """
    arguments = (query, inner, key_in, solve, key_out, value, decay, state, steps, scale)
    read, final = _Scan.apply(*arguments)  # type: ignore[no-untyped-call]
    return read, final
