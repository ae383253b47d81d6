import pytest
import torch

from hqlt import MemoryConfig
from hqlt.layers.mixers import Mixer
from hqlt.layers.norm import RMSNorm
from tests.helpers import assert_close
from tests.layers.configurations import MIXERS

B, T, D, H, V = 2, 5, 12, 3, 4


def mixer(kind: str) -> Mixer:
    return Mixer(MemoryConfig(hidden_size=D, num_heads=H, mixer=kind)).double()


def norm() -> RMSNorm:
    """With weights of its own, so that a read that is not normalised would show."""
    layer = RMSNorm(V, 1e-6).double()
    torch.nn.init.uniform_(layer.weight, 0.5, 2.0)
    return layer


def reads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(B, T, D, dtype=torch.float64)
    return x, *torch.randn(2, B, T, H, V, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    list(zip(MIXERS, (0, 2, 2 * H * D, D * H * V, 2 * D * H * V), strict=True)),
)
def test_parameters(kind, parameters):
    assert sum(p.numel() for p in mixer(kind).parameters()) == parameters


@pytest.mark.parametrize("kind", MIXERS)
def test_reads_combine_by_the_weights(kind):
    layer, (x, fw_read, kv_read), after = mixer(kind), reads(), norm()
    fw, kv = layer.weights(x)
    assert_close(after(*layer(x, fw_read, kv_read)), after(fw * fw_read + kv * kv_read), 1e-12)


def test_sum_and_static_scalars_start_alike():
    (x, fw_read, kv_read), after = reads(), norm()
    assert torch.equal(after(*mixer("sum")(x, fw_read, kv_read)), after(fw_read + kv_read))
    static = mixer("static_scalar")
    assert torch.equal(after(*static(x, fw_read, kv_read)), after(fw_read + kv_read))
    with torch.no_grad():
        static.fw_scale.fill_(0.5)
        static.kv_scale.fill_(3.0)
    assert_close(after(*static(x, fw_read, kv_read)), after(0.5 * fw_read + 3 * kv_read), 1e-12)


def test_dynamic_scalar_gates_whole_heads():
    layer, (x, *_) = mixer("dynamic_scalar"), reads()
    fw, kv = layer.weights(x)
    gate = torch.sigmoid(x @ layer.gate_proj.weight.T)
    assert torch.equal(fw, gate[..., :H, None])
    assert torch.equal(kv, gate[..., H:, None])


def test_dynamic_vector_is_a_convex_combination():
    layer, (x, fw_read, _), after = mixer("dynamic_vector"), reads(), norm()
    fw, kv = layer.weights(x)
    assert torch.equal(fw, torch.sigmoid(x @ layer.gate_proj.weight.T).view(B, T, H, V))
    assert_close(fw + kv, torch.ones_like(fw), 1e-12)
    assert_close(after(*layer(x, fw_read, fw_read)), after(fw_read), 1e-12)


def test_separate_vectors_lie_side_by_side_in_each_head():
    layer, (x, *_) = mixer("dynamic_vector_separate"), reads()
    fw, kv = layer.weights(x)
    gate = torch.sigmoid(x @ layer.gate_proj.weight.T).view(B, T, H, 2 * V)
    assert torch.equal(fw, gate[..., :V])
    assert torch.equal(kv, gate[..., V:])
