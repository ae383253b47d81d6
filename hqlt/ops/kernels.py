"""What the Triton kernels share: tiles in registers, and the two memories' work on one tile.

A tile holds C rows (tokens of one document and head) in float32; rows and columns beyond the data are 0. A tile of
queries or keys has its columns in two halves of BK / 2, so that rotary pairs stay at equal places of the halves
whatever K is. Importing this module imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rows_of(document, query_borders, key_borders):
    """First row and number of a document's queries, then of its keys, which end with the queries' own tokens."""
    start, key_start = tl.load(query_borders + document), tl.load(key_borders + document)
    length = tl.load(query_borders + document + 1) - start
    return start, length, key_start, tl.load(key_borders + document + 1) - key_start


@triton.jit
def halved_columns(K: tl.constexpr, BK: tl.constexpr):
    """Column of each place of a halved tile, and whether there is one."""
    place = tl.arange(0, BK)
    if BK == K:  # told apart so that the compiler sees neighbours in memory
        return place, place < K
    else:
        within = place % (BK // 2)
        return tl.where(place >= BK // 2, within + K // 2, within), within < K // 2


@triton.jit
def load_tile(pointer, rows, present, stride, columns, exist):
    """[C, columns] in float32; 0 where there is no row or no column."""
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + places, mask=present[:, None] & exist[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, x, rows, present, stride, columns, exist):
    """The converse of :func:`load_tile`, in the dtype of the pointer."""
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointer + places, x.to(pointer.dtype.element_ty), mask=present[:, None] & exist[None, :])


@triton.jit
def load_column(pointer, rows, present, stride):
    """[C] in float32; 0 where there is no row."""
    return tl.load(pointer + rows.to(tl.int64) * stride, mask=present, other=0.0).to(tl.float32)


@triton.jit
def unit_silu(x):
    """silu(x) / √(Σ silu(x)² + 10⁻⁶) of each row, and the factor that normalises it, [C, 1]."""
    y = x * tl.sigmoid(x)
    inverse = tl.rsqrt(tl.sum(y * y, 1) + 1e-6)[:, None]
    return y * inverse, inverse


@triton.jit
def unit_silu_gradient(grad, x, y, inverse):
    """The gradient of x from that of y, where ``y, inverse = unit_silu(x)``."""
    grad = inverse * (grad - y * tl.sum(grad * y, 1)[:, None])
    gate = tl.sigmoid(x)
    return grad * gate * (1.0 + x * (1.0 - gate))


@triton.jit
def turn(x, cos, sin, rows, present, stride, K: tl.constexpr, SIGN: tl.constexpr):
    """Rotate the rows of a halved tile by the angles in these rows of the tables, forward (1) or back (−1)."""
    C: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    place = tl.arange(0, BK)
    within = place % (BK // 2)
    cosine = load_tile(cos, rows, present, stride, within, within < K // 2)
    sine = load_tile(sin, rows, present, stride, within, within < K // 2)
    first, last = tl.split(tl.permute(tl.reshape(x, [C, 2, BK // 2]), (0, 2, 1)))
    swapped = tl.reshape(tl.permute(tl.join(last, first), (0, 2, 1)), [C, BK])
    return x * cosine + swapped * sine * tl.where(place >= BK // 2, SIGN, -SIGN)[None, :]


@triton.jit
def unit_lower_inverse(lower, PRECISION: tl.constexpr):
    """(I + N)⁻¹ of a strictly lower N [C, C], C a power of two of at most 64.

    Diagonal blocks of twice the size in each step: with X the inverse of those before and O what lies between two
    of them, X − X O X. A series in powers of N would be as short, and lose all digits where keys repeat.
    """
    row, column = tl.arange(0, lower.shape[0])[:, None], tl.arange(0, lower.shape[0])[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, lower, 0.0)
    for step in tl.static_range(1, 6):
        if lower.shape[0] >> step > 1:
            between = (row >> step + 1 == column >> step + 1) & (row >> step > column >> step)
            across = dot(inverse, tl.where(between, lower, 0.0), PRECISION)
            inverse -= dot(across, inverse, PRECISION)
    return inverse


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, ANCHORED: tl.constexpr):
    """Position of the first key that the query at this position sees, before a clamp at 0."""
    if ANCHORED:
        return position - position % WINDOW
    else:
        return position - WINDOW + 1


@triton.jit
def attend(
    q, position, total, key, value, cos, sin, first_row, first_angle, k_stride, v_stride, angle_stride,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, ANCHORED: tl.constexpr, ROTARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Window softmax of a tile of queries: read [C, BV] and the base-2 logarithm of the weights' sum, [C].

    Args:
        q: [C, BK], rotated and scaled by s₀ log₂ e.
        position: of the queries among the document's keys, [C], consecutive.
        total: the number of keys of the document.
        key, value: at the document's head; row 0 of the document is ``first_row``, its angles ``first_angle``.
    """
    C: tl.constexpr = q.shape[0]
    k_columns, k_exist = halved_columns(K, BK)
    v_columns = tl.arange(0, BV)
    here = tl.arange(0, C)
    oldest = first_visible(position, WINDOW, ANCHORED)
    start = tl.maximum(tl.min(oldest), 0)
    stop = tl.minimum(tl.max(position) + 1, total)
    top = tl.full([C], -1.0e30, tl.float32)
    sums = tl.zeros([C], tl.float32)
    read = tl.zeros([C, BV], tl.float32)
    for first in range(start, stop, C):
        places = first + here
        present = places < total
        k = load_tile(key, first_row + places, present, k_stride, k_columns, k_exist)
        if ROTARY:
            k = turn(k, cos, sin, first_angle + places, present, angle_stride, K, 1)
        v = load_tile(value, first_row + places, present, v_stride, v_columns, v_columns < V)
        seen = (places[None, :] <= position[:, None]) & (places[None, :] >= oldest[:, None]) & present[None, :]
        scores = tl.where(seen, dot(q, tl.trans(k), PRECISION), -1.0e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - higher)
        weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        sums = sums * fade + tl.sum(weights, 1)
        read = read * fade[:, None] + dot(weights, v, PRECISION)
        top = higher
    sums = tl.where(sums > 0.0, sums, 1.0)  # rows beyond the document see nothing
    return read / sums[:, None], top + tl.log2(sums)


@triton.jit
def correct_tile(q, k, v, beta, state, scale, PRECISION: tl.constexpr):
    """The delta rule over a tile that enters with ``state`` [BK, BV].

    With L the strictly lower part of K Kᵀ, X = (I + diag(β) L)⁻¹ and R = V − K M, the tile writes
    U = X diag(β) R: read = s (Q M + tril(Q Kᵀ) U), M ← M + Kᵀ U. The errors of recall are
    E = R − L U, and U = diag(β) E.

    Returns:
        read [C, BV], the next state, X [C, C], E [C, BV].
    """
    C: tl.constexpr = q.shape[0]
    here = tl.arange(0, C)
    lower = tl.where(here[:, None] > here[None, :], dot(k, tl.trans(k), PRECISION), 0.0)
    inverse = unit_lower_inverse(beta[:, None] * lower, PRECISION)
    rest = v - dot(k, state, PRECISION)
    write = dot(inverse, beta[:, None] * rest, PRECISION)
    seen = tl.where(here[:, None] >= here[None, :], dot(q, tl.trans(k), PRECISION), 0.0)
    read = scale * (dot(q, state, PRECISION) + dot(seen, write, PRECISION))
    errors = rest - dot(lower, write, PRECISION)
    return read, state + dot(tl.trans(k), write, PRECISION), inverse, errors
