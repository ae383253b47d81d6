import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which neither torch nor hqlt do by themselves.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("tests.helpers", "tests.ops.fast_weight")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on a CPU, slowly; read when Triton is first imported

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
