"""The whole core of a layer, both reads and their blend, against full attention, over sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqlt.bench.ops import ATTENTION, CHECKED_LENGTH, attention_contender, transformers_fallback
from hqlt.bench.record import Record
from hqlt.bench.timing import Contender, contest, relative_error, worst
from hqlt.config import MemoryConfig
from hqlt.files import write_text
from hqlt.layers import HybridMemory
from hqlt.ops import rotary_table
from hqlt.ops.rotary import rotate

Read = Callable[[HybridMemory], Tensor]

CORE = "hqlt"
PLAIN = "plain autograd"
CONFIG = MemoryConfig(hidden_size=1024, num_heads=8, window=64)
LENGTHS = (2048, 4096, 8192, 16384)


class _Given(nn.Module):
    """In place of a projection: a leaf that gets its gradient, so that projections cost nothing."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)

    def forward(self, _: Tensor) -> Tensor:
        return self.weight


def make_core(length: int, config: MemoryConfig = CONFIG) -> HybridMemory:
    """A layer whose projections are replaced by their outputs, the same for the same length and any backend."""
    generator = torch.Generator().manual_seed(0)

    def given(width: int) -> _Given:
        return _Given(torch.randn(1, length, width, generator=generator))

    layer = HybridMemory(config)
    assert layer.update_rule is not None
    assert layer.mixer is not None
    width = config.hidden_size
    layer.query_proj, layer.key_proj, layer.value_proj = given(width), given(width), given(width)  # type: ignore[assignment]
    layer.mixer.gate_proj = given(width)  # type: ignore[assignment]
    layer.update_rule.beta_proj = given(config.num_heads)
    layer.output_proj = nn.Identity()  # type: ignore[assignment]
    return layer


def read_core(core: HybridMemory) -> Tensor:
    """Output [1, T, D] of a layer with given projections."""
    y: Tensor = core(torch.empty_like(core.query_proj.weight))[0]
    return y


def read_plain(core: HybridMemory) -> Tensor:
    """The same from torch's differentiable functions and transformers' chunk form: what autograd keeps, it keeps."""
    config, fallback = core.config, transformers_fallback()
    assert fallback is not None
    assert core.update_rule is not None
    assert core.mixer is not None
    assert core.output_norm is not None
    assert config.window is not None
    none = torch.empty(0)
    projections = (core.query_proj, core.key_proj, core.value_proj, core.mixer.gate_proj)
    query, key, value, gate = (p(none).unflatten(-1, (config.num_heads, -1)) for p in projections)
    value = F.silu(value)
    features = [F.normalize(F.silu(x), dim=-1) for x in (query, key)]
    beta: Tensor = core.update_rule.beta_proj(none)  # type: ignore[operator]
    fw_read = fallback(*features, value, beta.sigmoid())
    cos, sin = (table[: query.shape[1]] for table in rotary_table(query.shape[1], config.rope_base, query))
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    kv_read = _plain_window(query, key, value, config.window)
    blended = torch.lerp(kv_read, fw_read, gate.sigmoid())
    return F.rms_norm(blended, core.output_norm.weight.shape, core.output_norm.weight, config.norm_eps).flatten(2)


def _plain_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Window attention of T queries, T a multiple of the window, tile by tile."""
    count = query.shape[1] // window
    tiles = query.unflatten(1, (count, window)).transpose(2, 3)
    keys, values = (F.pad(x, (0, 0, 0, 0, window, 0)).unfold(1, 2 * window, window).mT for x in (key, value))
    position = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)[None, :]
    visible = ((position >= 0) & (position < window)).repeat(query.shape[0], count, 1, 1)
    visible[:, 0, :, :window] = False
    tiles, keys, values = (x.flatten(0, 1) for x in (tiles, keys, values))
    read = F.scaled_dot_product_attention(tiles, keys, values, attn_mask=visible.flatten(0, 1)[:, None])
    tiled: Tensor = read.unflatten(0, (-1, count)).transpose(2, 3)
    return tiled.flatten(1, 2)


def bench_layer(lengths: tuple[int, ...], repeats: int, seconds: float) -> Iterator[list[Record]]:
    """Forward and backward of the core (B 1, H 8, K = V = 128, window 64) against full attention."""
    for length in lengths:
        torch.manual_seed(0)
        inputs = [torch.randn(1, length, 8, 128) for _ in range(3)]
        contenders = [_contender(CORE, read_core, length), attention_contender(inputs, True)]
        if length == min(lengths) and transformers_fallback() is not None and length % 64 == 0:
            contenders.append(_contender(PLAIN, read_plain, length))
        case = f"core T{length}, forward+backward"
        yield contest(
            case, contenders, baseline=ATTENTION, tokens=length, repeats=repeats, seconds=seconds, memory=True
        )


def _contender(name: str, read: Read, length: int) -> Contender:
    core = make_core(length)
    parameters = list(core.parameters())

    def run() -> None:
        y = read(core)
        y.backward(torch.ones(()).expand_as(y))
        for parameter in parameters:
            parameter.grad = None

    def error() -> float:
        """Against the recurrence, on a shorter sequence where this one is long."""
        size = min(length, CHECKED_LENGTH)
        own, reference = make_core(size), make_core(size, replace(CONFIG, backend="reference"))
        reference.load_state_dict(own.state_dict())
        upstream = torch.randn(1, size, CONFIG.hidden_size)
        found, expected = (_outcome(f, c, upstream) for f, c in ((read, own), (read_core, reference)))
        return worst([relative_error(a, b) for a, b in zip(found, expected, strict=True)])

    return Contender(name, run, error)


def _outcome(read: Read, core: HybridMemory, upstream: Tensor) -> list[Tensor]:
    y = read(core)
    used = dict(core.named_parameters())
    return [y, *torch.autograd.grad(y, list(used.values()), upstream)]


def plot_cost(records: list[Record], path: Path) -> None:
    """Cost against length as an SVG file: milliseconds of the core and of full attention."""
    from hqlt.analysis.report import figure_svg, plot_curves

    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.milliseconds is not None and record.tokens is not None and record.name != PLAIN:
            curves.setdefault(record.name, []).append((record.tokens, record.milliseconds))
    write_text(path, figure_svg(plot_curves(curves, "tokens", "forward + backward (ms)", logarithmic=True)))
