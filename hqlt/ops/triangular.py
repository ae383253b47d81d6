"""Inverse of unit lower triangular matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 4


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ of strictly lower triangular L [n, C, C], without gradients.

    Closed form in diagonal blocks of 4, then block elimination by matrix products, which doubles the block size at
    each level. Every intermediate is an inverse of a diagonal block, so nothing grows that the result does not have:
    near-identical keys with β near 2 stay exact, where a sum of powers of L cancels catastrophically.
    """
    size = lower.shape[-1]
    blocks = -(-size // BASE)
    padded = BASE << (blocks - 1).bit_length()
    if padded != size:
        lower = F.pad(lower, (0, padded - size, 0, padded - size))
    inverse = torch.zeros_like(lower)
    _invert_blocks(lower, inverse)
    width = BASE
    while width < padded:
        # Pairs of neighbouring blocks: [[A, 0], [−B L A, B]] with L the block below A.
        first, second = _block(inverse, width, 0, 0), _block(inverse, width, 1, 1)
        corner = torch.matmul(second, torch.matmul(_block(lower, width, 1, 0), first))
        _block(inverse, width, 1, 0).copy_(corner.neg_())
        width *= 2
    # One Newton step removes most of the rounding that elimination has left: with β near 2 a state that flips at
    # every token keeps each error for good.
    residual = torch.baddbmm(inverse, lower, inverse).neg_()
    residual.diagonal(dim1=-2, dim2=-1).add_(1)
    inverse = torch.baddbmm(inverse, inverse, residual)
    return inverse if padded == size else inverse[:, :size, :size].contiguous()


def _block(matrix: Tensor, width: int, row: int, column: int) -> Tensor:
    """Block (row, column) of every pair of diagonal blocks of this width, a view [n, pairs, width, width]."""
    count, size, _ = matrix.shape
    pairs = size // (2 * width)
    strides = (size * size, 2 * width * (size + 1), size, 1)
    return matrix.as_strided(
        (count, pairs, width, width), strides, matrix.storage_offset() + width * (row * size + column)
    )


def _invert_blocks(lower: Tensor, inverse: Tensor) -> None:
    """Write the inverses of the diagonal blocks of I + L, entry by entry for all blocks at once."""
    count, size, _ = lower.shape
    blocks = size // BASE

    def entry(matrix: Tensor, row: int, column: int) -> Tensor:
        offset = matrix.storage_offset() + row * size + column
        return matrix.as_strided((count, blocks), (size * size, BASE * (size + 1)), offset)

    known: dict[tuple[int, int], Tensor] = {}
    for row in range(BASE):
        entry(inverse, row, row).fill_(1)
        for column in range(row - 1, -1, -1):
            value = entry(lower, row, column).neg()
            for middle in range(column + 1, row):
                value.addcmul_(entry(lower, row, middle), known[middle, column], value=-1)
            known[row, column] = value
            entry(inverse, row, column).copy_(value)
