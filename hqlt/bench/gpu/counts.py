"""Bytes and FLOPs of every kernel of our own, in closed form.

Bytes: every number that a kernel reads or writes, once, wherever it comes from; what several programs read is read from
memory once and then from cache. FLOPs: the matrix products of :mod:`hqlt.ops.kernels`, a multiply-add is 2, tiles that
are only partly filled or partly visible count in full. Layout tables of a few numbers a document are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FULL = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a launch does.

    Attributes:
        kernel: its name.
        moved: bytes.
        tf32_flops: of products with operands of 19 bits. bf16_flops: of those in bfloat16.
    """

    kernel: str
    moved: float
    tf32_flops: float = 0.0
    bf16_flops: float = 0.0

    @property
    def flops(self) -> float:
        """All products."""
        return self.tf32_flops + self.bf16_flops

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.moved

    def arithmetic_seconds(self, bf16_peak: float) -> float:
        """Time of the products at a peak of so many FLOP/s in bfloat16 and half of that in tf32."""
        return (2 * self.tf32_flops + self.bf16_flops) / bf16_peak

    def seconds(self, bf16_peak: float, bandwidth: float) -> float:
        """Least time: of the products or of the bytes, whichever takes longer."""
        return max(self.arithmetic_seconds(bf16_peak), self.moved / bandwidth)


def total(kernel: str, works: Iterable[Work]) -> Work:
    """Several launches as one."""
    parts = list(works)
    sums = [sum(column) for column in zip(*((w.moved, w.tf32_flops, w.bf16_flops) for w in parts), strict=True)]
    return Work(kernel=kernel, moved=sums[0], tf32_flops=sums[1], bf16_flops=sums[2])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of B equal documents, and how they are cut.

    Attributes:
        batch, length, heads, key_dim, value_dim: B, T, H, K, V.
        window: S. anchored: whether it counts from multiples of S.
        item: bytes of a number of the inputs.
        tile: tokens C of a program's tile. columns: of the state in a program of the delta rule's backward pass.
    """

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    window: int = 64
    anchored: bool = False
    item: int = 2
    tile: int = 32
    columns: int = 64

    @property
    def rows(self) -> int:
        """Tokens of all heads and documents, n = B·T·H."""
        return self.batch * self.length * self.heads

    @property
    def tiles(self) -> int:
        """Of all heads and documents, B·H·⌈T/C⌉."""
        return self.batch * self.heads * -(-self.length // self.tile)

    @property
    def state(self) -> int:
        """Bytes of all fast weights, 4·B·H·K·V."""
        return FULL * self.batch * self.heads * self.key_dim * self.value_dim

    @property
    def angles(self) -> int:
        """Bytes of cosines and sines, in float32 and the same for all heads: 4·T·K."""
        return FULL * self.length * self.key_dim

    @property
    def tokens(self) -> int:
        """Bytes of query, key and value: n·(2K + V) numbers."""
        return self.item * self.rows * (2 * self.key_dim + self.value_dim)

    @property
    def kept(self) -> int:
        """Bytes that a repeated pass leaves in float32: states at tiles' starts, their inverses, and the errors."""
        squares = self.tiles * (self.key_dim * self.value_dim + self.tile**2)
        return FULL * (squares + self.rows * self.value_dim)


def least_bytes(shape: Shape, *, backward: bool = False) -> int:
    """Bytes that both memories cannot do without: query, key, value, gate logit, β read once, the output written.

    n·(2K + 3V + 1) numbers. With the backward pass all five and the gradient of the output are read and their gradients
    written besides: n·(6K + 8V + 3) altogether.
    """
    inputs = 2 * shape.key_dim + 2 * shape.value_dim + 1
    numbers = inputs + shape.value_dim
    if backward:
        numbers += 2 * inputs + shape.value_dim
    return shape.item * shape.rows * numbers


def visited(shape: Shape) -> tuple[int, int]:
    """Pairs of a tile of queries and one of keys that forward passes and gradients of queries take up, and pairs that
    gradients of keys take up, over all heads and documents."""
    tile, length, window = shape.tile, shape.length, shape.window
    of_queries = of_keys = 0
    for start in range(0, length, tile):
        last = start + tile - 1
        first = start // window * window if shape.anchored else max(0, start - window + 1)
        of_queries += -(-(min(last + 1, length) - first) // tile)
        stop = last - last % window + window if shape.anchored else last + window
        of_keys += -(-(min(stop, length) - start) // tile)
    return of_queries * shape.batch * shape.heads, of_keys * shape.batch * shape.heads


def scan_flops(shape: Shape) -> int:
    """A tile of the delta rule: 6·C·K·V + 4·C²·K + 6·C²·V, and 4·C³·(log₂ C − 1) for the inverse."""
    tile, key_dim, value_dim = shape.tile, shape.key_dim, shape.value_dim
    inverse = 4 * tile**3 * (tile.bit_length() - 2)
    return shape.tiles * (6 * tile * key_dim * value_dim + tile**2 * (4 * key_dim + 6 * value_dim) + inverse)


def attend_flops(shape: Shape) -> int:
    """A pair of tiles of the window's softmax: 2·C²·(K + V)."""
    return visited(shape)[0] * 2 * shape.tile**2 * (shape.key_dim + shape.value_dim)


def delta_forward(shape: Shape) -> Work:
    """Reads query, key, value, β and the first state; writes the read and the last."""
    moved = shape.tokens + shape.item * shape.rows * (1 + shape.value_dim) + 2 * shape.state
    return Work(kernel="_forward", moved=moved, tf32_flops=scan_flops(shape))


def delta_repeat(shape: Shape) -> Work:
    """The same, to keep what the backward pass needs."""
    moved = shape.tokens + shape.item * shape.rows + shape.state + shape.kept
    return Work(kernel="_forward", moved=moved, tf32_flops=scan_flops(shape))


def delta_backward(shape: Shape, grad_item: int = 2) -> Work:
    """Reads query, key, β, what was kept, and the gradients of the read (of ``grad_item`` bytes) and of the last state;
    writes gradients in float32, those of query, key and β once for each of P blocks of columns.

    FLOPs of a tile: 12·C·K·V + 8·C²·V + P·8·C²·K.
    """
    parts = -(-shape.value_dim // shape.columns)
    tile, key_dim, value_dim = shape.tile, shape.key_dim, shape.value_dim
    read = shape.item * shape.rows * (2 * key_dim + 1) + shape.kept + grad_item * shape.rows * value_dim + shape.state
    written = FULL * shape.rows * (parts * (2 * key_dim + 1) + value_dim) + shape.state
    flops = 12 * tile * key_dim * value_dim + 8 * tile**2 * (value_dim + parts * key_dim)
    return Work(kernel="_backward", moved=read + written, tf32_flops=shape.tiles * flops)


def window_forward(shape: Shape) -> Work:
    """Reads query, key, value and angles; writes the read and the weights' sums."""
    moved = shape.tokens + shape.angles + shape.rows * (shape.item * shape.value_dim + FULL)
    return Work(kernel="_forward", moved=moved, tf32_flops=attend_flops(shape))


def window_backward(shape: Shape, grad_item: int = 2, added: bool = False) -> list[Work]:
    """Gradients of queries, then of keys and values, each from query, key, value, angles, two numbers a row and the
    gradient of the read; ``added`` to others in float32. 4·C²·K + 2·C²·V and 4·C²·(K + V) FLOPs a pair of tiles."""
    given = shape.tokens + shape.angles + shape.rows * (2 * FULL + grad_item * shape.value_dim)
    pairs = [2 * shape.tile**2 * count for count in visited(shape)]
    number = shape.item + FULL * added
    queries = Work(
        kernel="_query_backward",
        moved=given + number * shape.rows * shape.key_dim,
        tf32_flops=pairs[0] * (2 * shape.key_dim + shape.value_dim),
    )
    keys = Work(
        kernel="_key_backward",
        moved=given + number * shape.rows * (shape.key_dim + shape.value_dim),
        tf32_flops=2 * pairs[1] * (shape.key_dim + shape.value_dim),
    )
    return [queries, keys]


def hybrid_forward(shape: Shape) -> Work:
    """:func:`least_bytes`, the norm's weight, angles, and the first and last state."""
    moved = least_bytes(shape) + FULL * shape.value_dim + shape.angles + 2 * shape.state
    return Work(kernel="_hybrid", moved=moved, tf32_flops=scan_flops(shape) + attend_flops(shape))


def hybrid_repeat(shape: Shape) -> Work:
    """The same with the gradient of the output instead of the output; writes that of the logit, in float32 those of
    both reads, two numbers a row, the norm's weight of each head, and what the backward pass of the scan needs."""
    forward = hybrid_forward(shape)
    written = shape.rows * (shape.item * shape.value_dim + FULL * (2 * shape.value_dim + 2)) + shape.kept
    heads = FULL * shape.batch * shape.heads * shape.value_dim
    return Work(
        kernel="_hybrid",
        moved=forward.moved - shape.state + written + heads,
        tf32_flops=forward.tf32_flops,
    )


def hybrid_launches(shape: Shape) -> list[Work]:
    """Forward and backward pass of both memories in one, in the order of the launches."""
    backward = [delta_backward(shape, FULL), *window_backward(shape, FULL, True)]
    return [hybrid_forward(shape), hybrid_repeat(shape), *backward]


def delta_launches(shape: Shape) -> list[Work]:
    """Forward and backward pass of the delta rule."""
    return [delta_forward(shape), delta_repeat(shape), delta_backward(shape, shape.item)]


def window_launches(shape: Shape) -> list[Work]:
    """Forward and backward pass of window attention."""
    return [window_forward(shape), *window_backward(shape, shape.item)]
