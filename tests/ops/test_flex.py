"""Window attention on flex_attention: on a CPU forward only, and tiny without its compiler."""

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from hqlt.ops import window_attention
from hqlt.ops.window import WINDOW_ATTENTION
from hqlt.ops.window.flex import block_mask
from tests.helpers import assert_close, assert_same_results, results
from tests.ops.test_window_attention import WINDOWS, packed_tokens, tokens, turned

LAYOUTS = [((0, 1), (0, 1)), ((0, 512), (0, 512)), ((0, 200), (0, 1000)), ((0, 300, 301, 700), (0, 300, 400, 900))]


def flex(query, key, value, *, window, anchored, angles=None, cu_seqlens=None, key_cu_seqlens=None, scale=0.3):
    (kernel,) = (kernel for kernel in WINDOW_ATTENTION.kernels if kernel.name == "flex_attention")
    borders, key_borders = (None if x is None else x.tolist() for x in (cu_seqlens, key_cu_seqlens))
    return kernel.run(query, key, value, angles, window, anchored, scale, borders, key_borders, 0.0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
def test_flex_equals_reference(window, anchored):
    options = {"window": window, "anchored": anchored, "scale": 0.3}
    calls = [(tokens(2, length, length + past), {}) for length, past in ((1, 0), (7, 40), (200, 0), (200, 40))]
    for x, borders in [*calls, packed_tokens(200)]:
        with torch.compiler.set_stance("force_eager"):
            read = flex(**x, **options, **borders)
        assert_close(read, window_attention(**x, **options, **borders, backend="reference"))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_flex_turns_query_and_key():
    x = tokens(2, 30, 40)
    options = {"window": 7, "anchored": False, "scale": 0.3, "angles": turned(30, 10)}
    with torch.compiler.set_stance("force_eager"):
        read = flex(**x, **options)
    assert_close(read, window_attention(**x, **options, backend="reference"))


@pytest.mark.parametrize(("window", "anchored"), [*WINDOWS, (130, False), (256, True)])
@pytest.mark.parametrize(("borders", "key_borders"), LAYOUTS)
def test_masks_of_blocks_are_those_of_all_pairs(borders, key_borders, window, anchored):
    mask = block_mask(borders, key_borders, window, anchored, torch.device("cpu"))
    whole = create_block_mask(mask.mask_mod, None, None, borders[-1], key_borders[-1], device="cpu")
    assert torch.equal(mask.to_dense(), whole.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(whole, name)), name


def test_a_mask_is_made_once():
    make = partial(block_mask, (0, 300), (0, 310), 64, False)
    assert make(torch.device("cpu")) is make(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("length", "past", "window", "anchored"), [(300, 0, 16, False), (301, 70, 64, True)])
def test_compiled_flex_equals_reference(length, past, window, anchored):
    shapes = {"query": length, "key": length + past, "value": length + past}
    x = {name: torch.randn(2, n, 2, 32) for name, n in shapes.items()}
    options = {"window": window, "anchored": anchored, "scale": 0.3}
    assert_close(flex(**x, **options), window_attention(**x, **options, backend="reference"), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "anchored"), WINDOWS)
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_of_libraries_equal_reference(packed, window, anchored):
    """Whatever ``fla`` chooses on this machine: flash-attn, flex_attention, or the chunked form."""
    shapes = {"query": (300, 32), "key": (345, 32), "value": (345, 32)}
    x = {name: torch.randn(1, n, 2, d, dtype=torch.float16) for name, (n, d) in shapes.items()}
    borders = {"cu_seqlens": torch.tensor([0, 3, 140, 300]), "key_cu_seqlens": torch.tensor([0, 33, 180, 345])}
    options = {"window": window, "anchored": anchored, **(borders if packed else {})}

    def on_device(**x):
        return (window_attention(**{name: y.cuda() for name, y in x.items()}, **options, backend="fla").cpu(),)

    def reference(**x):
        return (window_attention(**{name: y.double() for name, y in x.items()}, **options, backend="reference"),)

    assert_same_results(results(on_device, x), results(reference, x), 5e-3)
