"""Ops against what else there is for a CPU: the delta rules, and window attention."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, relative_error, worst
from hqlt.ops import delta_rule, gated_delta_rule, window_attention
from hqlt.ops.chunked import choose_tile

Function = Callable[..., Tensor]

FALLBACK = "transformers fallback (gated)"
ATTENTION = "full causal attention (SDPA)"
# B, T, H, K = V: the size of a layer of the paper's language models, formal languages, reinforcement learning.
SHAPES = [(1, 2048, 8, 128), (64, 40, 4, 32), (64, 128, 4, 32), (64, 256, 4, 32), (64, 90, 2, 50)]
WINDOW, WINDOW_SHAPE = 64, SHAPES[0]
# Gradients are compared with those of the recurrence on this many tokens, outputs on all.
CHECKED_LENGTH = 512


def transformers_fallback() -> Function | None:
    """The PyTorch form of the gated delta rule that transformers runs where its kernels are missing, if installed."""
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError:
        return None
    # Its warning says that this is the slow form, which is why it is here.
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def run(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
        log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
        read: Tensor = torch_chunk_gated_delta_rule(query, key, value, log_decay, beta)[0]
        return read

    return run


def bench_ops(repeats: int, seconds: float) -> Iterator[list[Record]]:
    """Delta rules at the shapes of language models, formal languages and reinforcement learning; window attention."""
    for shape in SHAPES:
        for name in ("delta rule", "gated delta rule"):
            yield from _delta(name, shape, repeats, seconds)
    yield from _window(WINDOW_SHAPE, repeats, seconds)


def _delta(name: str, shape: tuple[int, int, int, int], repeats: int, seconds: float) -> Iterator[list[Record]]:
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape) for _ in range(3))
    inputs = [query, F.normalize(key, dim=-1), value, torch.rand(shape[:3])]
    own: Callable[..., tuple[Tensor, Tensor]] = delta_rule
    if name == "gated delta rule":
        own = gated_delta_rule
        inputs.append(-0.1 * torch.rand(shape[:3]))
    functions: dict[str, Function] = {"hqlt": lambda *x: own(*x)[0]}
    fallback = transformers_fallback()
    if fallback is not None:
        functions[FALLBACK] = fallback

    def reference(*x: Tensor) -> Tensor:
        return own(*x, backend="reference")[0]

    for backward in (False, True):
        flops = batch * length * heads * (10 * choose_tile(dim, backward) * dim + 6 * dim**2)
        passes = "forward+backward" if backward else "forward"
        case = f"{name} B{batch} T{length} H{heads} K=V={dim}, {passes}"
        contenders = contenders_of(functions, reference, inputs, backward)
        options = {"baseline": FALLBACK, "tokens": batch * length, "repeats": repeats, "seconds": seconds}
        yield contest(case, contenders, flops=flops * (3 if backward else 1), memory=True, **options)  # type: ignore[arg-type]


def _window(shape: tuple[int, int, int, int], repeats: int, seconds: float) -> Iterator[list[Record]]:
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for _ in range(3)]
    for backward in (False, True):
        passes = "forward+backward" if backward else "forward"
        case = f"window {WINDOW} B{batch} T{length} H{heads} K=V={dim}, {passes}"
        contenders = [
            *contenders_of({"hqlt": _windowed("auto")}, _windowed("reference"), inputs, backward),
            attention_contender(inputs, backward),
        ]
        options = {"baseline": ATTENTION, "tokens": batch * length, "repeats": repeats, "seconds": seconds}
        yield contest(case, contenders, memory=True, **options)  # type: ignore[arg-type]


def _windowed(backend: str) -> Function:
    return lambda query, key, value: window_attention(query, key, value, window=WINDOW, backend=backend)


def attention_contender(inputs: list[Tensor], backward: bool) -> Contender:
    """The platform's attention over the whole past, in this library's layout."""

    def attend(*x: Tensor) -> Tensor:
        query, key, value = (y.transpose(1, 2) for y in x)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def reference(*x: Tensor) -> Tensor:
        return window_attention(*x, window=None, backend="reference")

    (contender,) = contenders_of({ATTENTION: attend}, reference, inputs, backward, CHECKED_LENGTH)
    return contender


def contenders_of(
    functions: dict[str, Function],
    reference: Function,
    inputs: list[Tensor],
    backward: bool,
    checked: int | None = None,
) -> list[Contender]:
    """Functions of [B, T, …] tensors, checked against a reference in float64.

    Args:
        backward: whether to run, and check, the gradients as well.
        checked: tokens on which outputs are compared; None is all.
    """
    leaves = [x.clone().requires_grad_(backward) for x in inputs]
    upstream = torch.randn(inputs[2].shape)
    start = [x[:, :checked].double() for x in inputs]
    with torch.no_grad():
        expected = reference(*start)
    short = [x[:, :CHECKED_LENGTH] for x in inputs]
    gradients = _gradients(reference, [x.double() for x in short], upstream) if backward else []

    def contender(name: str, function: Function) -> Contender:
        def run() -> None:
            if not backward:
                with torch.no_grad():
                    function(*leaves)
                return
            function(*leaves).backward(upstream)
            for leaf in leaves:
                leaf.grad = None

        def error() -> float:
            with torch.no_grad():
                output = function(*(x[:, :checked] for x in inputs))
            errors = [relative_error(output, expected)]
            found = _gradients(function, short, upstream) if backward else []
            return worst(errors + [relative_error(a, b) for a, b in zip(found, gradients, strict=True)])

        return Contender(name, run, error)

    return [contender(name, function) for name, function in functions.items()]


def _gradients(function: Function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    return list(torch.autograd.grad(output, leaves, upstream[:, : output.shape[1]].to(output.dtype)))
