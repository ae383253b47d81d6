"""Fast weights on flash-linear-attention: on a GPU, or interpreted in float16 where the package is installed."""

import sys
import warnings
from itertools import pairwise

import pytest
import torch

from hqlt.ops import delta_rule, gated_delta_rule, linear_attention
from hqlt.ops.backend import INSTALLED
from hqlt.ops.delta import DELTA_RULE
from hqlt.ops.gated_delta import GATED_DELTA_RULE
from hqlt.ops.linear import LINEAR_ATTENTION
from hqlt.ops.fla import run_kernel
from tests.helpers import assert_same_results, results

HEADS, KEY_DIM, VALUE_DIM = 2, 16, 32
OPS = {
    "delta": (DELTA_RULE, delta_rule),
    "gated_delta": (GATED_DELTA_RULE, gated_delta_rule),
    "linear": (LINEAR_ATTENTION, linear_attention),
}


class _LoopVariable(int):
    def to(self, dtype: object) -> "_LoopVariable":
        return self


@pytest.fixture(scope="module")
def interpreted() -> None:
    """Kernels that run on a CPU: one configuration each, and loops whose variables are integers of Triton's kind."""
    if torch.cuda.is_available() or not INSTALLED["fla"]:
        pytest.skip("for a machine with flash-linear-attention and no GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fla.ops.delta_rule
        import fla.ops.gated_delta_rule
        import fla.ops.linear_attn
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if not name.startswith("fla.ops"):
            continue
        module.range = lambda *ends: map(_LoopVariable, range(*map(int, ends)))
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = kernel.fn
