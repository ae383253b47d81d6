import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hqlt import HybridMemory, LanguageModel, MemoryConfig, ModelConfig, ModelState, SequenceModel
from tests.helpers import EXACT, assert_close, borders_of, only_memory

VOCABULARY = 11
HYBRID = (
    MemoryConfig(hidden_size=16, window=4, schedule="delayed_streaming", update_rule="gated_delta"),
    MemoryConfig(hidden_size=16, update_rule=None, window=None),
    MemoryConfig(hidden_size=16, kv_memory=False, short_convolution=True),
    MemoryConfig(hidden_size=16, window=3, schedule="delayed_chunk", update_rule="linear"),
)


def small_model(**options: object) -> LanguageModel:
    options = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "memory": HYBRID, "initializer_range": 0.5, **options}
    return LanguageModel(ModelConfig(**options)).double()


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length))


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Size and initialisation


def count(memory: MemoryConfig, layers: int = 24, vocabulary: int = 32000) -> int:
    with torch.device("meta"):
        return parameters(
            LanguageModel(ModelConfig(vocab_size=vocabulary, num_hidden_layers=layers, memory=memory))
        )  # fmt: skip


SIZES = {"340M": {"hidden_size": 1024, "num_heads": 8}, "1.3B": {"hidden_size": 2048, "num_heads": 16}}
PUBLISHED = [
    ({"mixer": "sum"}, 374_067_200, 1_365_087_232),
    (only_memory(), 374_067_200, 1_365_087_232),
    (only_memory(short_convolution=True), 374_362_112, 1_365_677_056),
    ({"mixer": "static_scalar"}, 374_067_248, 1_365_087_280),
    ({"mixer": "dynamic_scalar"}, 374_460_416, 1_366_660_096),
    ({"mixer": "dynamic_vector"}, 399_233_024, 1_465_750_528),
    ({"schedule": "delayed_streaming"}, 399_233_024, 1_465_750_528),
    ({"schedule": "delayed_chunk", "position_encoding": "none"}, 399_233_024, 1_465_750_528),
    ({"mixer": "dynamic_vector_separate"}, 424_398_848, 1_566_413_824),
]


@pytest.mark.parametrize(("options", "small", "large"), PUBLISHED, ids=str)
def test_parameter_counts_of_the_published_models(options, small, large):
    for size, expected in (("340M", small), ("1.3B", large)):
        memory = MemoryConfig(**SIZES[size], **{"window": 64, **options})
        assert count(memory) == expected


def test_parameter_counts_of_transformers():
    for size, expected in (("340M", 373_867_520), ("1.3B", 1_364_297_728)):
        width = SIZES[size]["hidden_size"]
        memory = MemoryConfig(hidden_size=width, num_heads=width // 64, update_rule=None, window=None)
        assert count(memory) == expected


def test_the_linear_rule_has_the_published_count_less_its_unused_beta_projection():
    published = 399_233_024
    assert count(MemoryConfig(**SIZES["340M"], window=64, update_rule="linear")) == published - 24 * 8 * 1024


def test_parameter_counts_of_the_synthetic_models():
    memory = MemoryConfig(hidden_size=128, num_heads=4, short_convolution=True, output_gate=True)
    assert count(memory, layers=2, vocabulary=3) == 595_392
    assert count(memory, layers=3, vocabulary=10) == 894_432


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (MemoryConfig(hidden_size=100, window=64, allow_negative_eigenvalues=True), 612_250),
        (MemoryConfig(hidden_size=100, kv_memory=False), 582_250),
    ],
)
def test_parameter_counts_of_the_reinforcement_learning_models(memory, expected):
    assert parameters(SequenceModel(ModelConfig(num_hidden_layers=3, memory=memory))) == expected


GPT2 = ModelConfig(
    num_hidden_layers=2,
    memory=MemoryConfig(
        hidden_size=100, num_heads=2, window=None, update_rule=None, position_encoding="none", bias=True
    ),
    norm="layer",
    mlp="gelu",
    position_embedding="sinusoidal",
)


def test_the_sinusoidal_gpt2_has_the_published_size():
    assert parameters(SequenceModel(GPT2)) == 242_800


def test_mlp_widths():
    for width, expected in ((1024, 2816), (2048, 5632), (128, 512), (100, 512)):
        assert ModelConfig(memory=MemoryConfig(hidden_size=width)).mlp_size == expected
    assert GPT2.mlp_size == 400
    assert replace(GPT2, intermediate_size=77).mlp_size == 77


RESIDUAL = ("output_proj.weight", "down_proj.weight")


def test_convolutions_and_write_strengths_can_have_ranges_of_their_own():
    memory = MemoryConfig(hidden_size=256, num_heads=8, short_convolution=True)
    options = {"conv_initializer_range": 0.3, "beta_initializer_range": 0.5}
    for given in ({}, options):
        model = LanguageModel(ModelConfig(vocab_size=7, num_hidden_layers=1, memory=memory, **given))
        inner = model.blocks[0].memory
        taps, strength = (p.std().item() for p in (inner.convolution.weight, inner.update_rule.beta_proj.weight))
        assert taps == pytest.approx(given.get("conv_initializer_range", 0.02), rel=0.1)
        assert strength == pytest.approx(given.get("beta_initializer_range", 0.02), rel=0.1)
        assert inner.query_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name, memory in (("conv", MemoryConfig()), ("beta", MemoryConfig(update_rule="linear"))):
        with pytest.raises(ValueError, match=f"{name}_initializer_range=0.1 has no effect: no memory has such weights"):
            ModelConfig(memory=memory, **{f"{name}_initializer_range": 0.1})
    with pytest.raises(ValueError, match="conv_initializer_range=-1"):
        ModelConfig(memory=MemoryConfig(short_convolution=True), conv_initializer_range=-1.0)


@pytest.mark.parametrize("rescale", [True, False])
def test_initialisation(rescale):
    config = ModelConfig(
        vocab_size=2000,
        num_hidden_layers=24,
        memory=MemoryConfig(
            hidden_size=64, mixer="static_scalar", update_rule="gated_delta", short_convolution=True, bias=True
        ),
        rescale_residual=rescale,
        norm="layer",
        intermediate_size=128,
    )
    groups: dict[str, list[torch.Tensor]] = {}
    for name, weight in LanguageModel(config).named_parameters():
        if name.endswith("bias") and "dt_bias" not in name:
            assert not weight.any(), name
        elif "norm" in name or "scale" in name:
            assert (weight == 1).all(), name
        elif name.endswith(("A_log", "dt_bias")):
            groups.setdefault(name.rsplit(".", 1)[1], []).append(weight)
        else:
            assert weight.dim() > 1, name
            kind = name.rsplit(".", 2)[1] if name.endswith(RESIDUAL) else "normal"
            groups.setdefault(kind, []).append(weight)
    stds = {kind: torch.cat([w.detach().flatten() for w in groups[kind]]) for kind in groups}
    for kind, fan_in in (("output_proj", 64), ("down_proj", 128)):
        bound = fan_in**-0.5 / math.sqrt(2 * 24)
        assert stds[kind].std().item() == pytest.approx(bound / math.sqrt(3) if rescale else 0.02, rel=0.02)
        assert (stds[kind].abs().max() <= bound) == rescale
    assert stds["normal"].std().item() == pytest.approx(0.02, rel=0.01)
    assert stds["A_log"].min() >= 0
    assert stds["A_log"].max() < math.log(16)
    step = F.softplus(stds["dt_bias"])
    assert 9e-4 < step.min() < step.max() < 0.11


def test_the_published_residual_scales():
    def std(fan_in: int) -> float:
        memory = MemoryConfig(hidden_size=8)
        config = ModelConfig(num_hidden_layers=24, memory=memory, intermediate_size=fan_in)
        model = SequenceModel(config)
        return torch.stack([block.mlp.down_proj.weight for block in model.blocks]).std().item()

    for fan_in, expected in ((1024, 0.0026042), (2816, 0.0015704), (2048, 0.0018414), (5632, 0.0011104)):
        assert std(fan_in) == pytest.approx(expected, rel=0.01)


def test_tied_embeddings_share_one_weight():
    model, untied = small_model(tie_embeddings=True), small_model()
    assert model.head.weight is model.embedding.weight
    assert parameters(untied) - parameters(model) == VOCABULARY * 16
    loss, _ = model.loss(ids(2, 9))
    loss.backward()
    assert model.embedding.weight.grad.any(1).all()


# Structure


def test_a_pattern_of_memories_repeats_over_the_blocks():
    model = small_model(num_hidden_layers=8)
    assert [block.memory.config for block in model.blocks] == [*HYBRID, *HYBRID]
    assert all(isinstance(block.memory, HybridMemory) for block in model.blocks)


def test_a_block_is_memory_then_mlp_beside_residuals():
    model = small_model(num_hidden_layers=1, memory=HYBRID[0])
    (block,), tokens = model.blocks, ids(2, 7)
    x = model.embedding(tokens)
    x = x + block.memory(F.rms_norm(x, (16,), block.memory_norm.weight, 1e-6))[0]
    h = F.rms_norm(x, (16,), block.mlp_norm.weight, 1e-6)
    gate, up = h @ block.mlp.gate_proj.weight.T, h @ block.mlp.up_proj.weight.T
    x = x + (F.silu(gate) * up) @ block.mlp.down_proj.weight.T
    logits = F.rms_norm(x, (16,), model.norm.weight, 1e-6) @ model.head.weight.T
    assert_close(model(tokens)[0], logits)


def test_a_block_without_mlp_is_memory_beside_a_residual():
    model = small_model(num_hidden_layers=2, memory=HYBRID[0], mlp=("swiglu", "none"))
    first, last = model.blocks
    tokens = ids(2, 7)
    x = model.embedding(tokens)
    x = x + first.memory(first.memory_norm(x))[0]
    x = x + first.mlp(first.mlp_norm(x))
    x = x + last.memory(last.memory_norm(x))[0]
    assert_close(model(tokens)[0], model.head(model.norm(x)))
    assert not any(name.startswith("blocks.1.mlp") for name in model.state_dict())


def test_the_gpt2_model_adds_sines_of_the_position():
    model = SequenceModel(GPT2).double()
    x = torch.randn(2, 9, 100).double()
    expected = x.clone()
    for t in range(9):
        for channel in range(50):
            angle = t * 10000 ** (-2 * channel / 100)
            expected[:, t, 2 * channel] += math.sin(angle)
            expected[:, t, 2 * channel + 1] += math.cos(angle)
    for block in model.blocks:
        memory, mlp = block.memory, block.mlp
        h = F.layer_norm(expected, (100,), block.memory_norm.weight, block.memory_norm.bias, 1e-6)
        projections = (memory.query_proj, memory.key_proj, memory.value_proj)
        query, key, value = (p(h).unflatten(-1, (2, 50)).transpose(1, 2) for p in projections)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        expected = expected + memory.output_proj(read)
        h = F.layer_norm(expected, (100,), block.mlp_norm.weight, block.mlp_norm.bias, 1e-6)
        expected = expected + mlp.down_proj(F.gelu(mlp.up_proj(h), approximate="tanh"))
    expected = F.layer_norm(expected, (100,), model.norm.weight, model.norm.bias, 1e-6)
    assert_close(model(x)[0], expected)


def test_dropout_acts_in_training_only():
    model, x = SequenceModel(replace(GPT2, dropout=0.2)), torch.randn(1, 5, 100)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


# One state for everything


@pytest.mark.parametrize("position_embedding", ["none", "sinusoidal"])
def test_segments_packs_and_pads_equal_the_whole(position_embedding):
    model, tokens = small_model(position_embedding=position_embedding), ids(2, 15)
    logits, state = model(tokens)
    for lengths in ([1] * 15, [4, 1, 10]):
        parts, carried = [], None
        for piece in tokens.split(lengths, 1):
            part, carried = model(piece, carried)
            parts.append(part)
        assert_close(torch.cat(parts, 1), logits)
        assert carried.position.tolist() == state.position.tolist() == [15, 15]
    packed, _ = model(tokens.reshape(1, 30), cu_seqlens=torch.tensor([0, 15, 30]))
    assert_close(packed.view(2, 15, -1), logits)
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[0, 3:], mask[1, :15] = True, True
    padded_ids = torch.zeros(2, 18, dtype=torch.long).masked_scatter(mask, tokens)
    padded, carried = model(padded_ids, attention_mask=mask)
    assert_close(padded[mask].view(2, 15, -1), logits)
    more = ids(2, 4)
    assert_close(model(more, carried)[0], model(more, state)[0])


def test_hidden_states_are_the_logits_before_the_head():
    model, tokens = small_model(), ids(2, 8)
    hidden, state = model.hidden_states(tokens)
    assert_close(model.head(hidden), model(tokens)[0])
    assert isinstance(state, ModelState)
    assert len(state.layers) == 4


# Loss


def test_loss_predicts_the_next_token():
    model, tokens = small_model(), ids(3, 9)
    logits, _ = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(model.loss(tokens)[0], expected)
    assert_close(model.loss(tokens, tokens.int())[0], expected)


def test_ignored_labels_do_not_count():
    model, tokens = small_model(), ids(3, 9)
    labels = tokens.clone()
    labels[:, :6] = -100
    labels[0] = -100
    logits, _ = model(tokens)
    expected = F.cross_entropy(logits[1:, 5:-1].flatten(0, 1), tokens[1:, 6:].flatten())
    assert_close(model.loss(tokens, labels)[0], expected)
    assert (labels[1:, 6:] == tokens[1:, 6:]).all()  # the caller's labels are as they were


def summed_loss(model: LanguageModel, rows: list[torch.Tensor]) -> torch.Tensor:
    """Mean over the targets of separate rows."""
    losses = [(model.loss(row[None])[0] * (len(row) - 1), len(row) - 1) for row in rows if len(row) > 1]
    return sum(loss for loss, _ in losses) / sum(n for _, n in losses)


def test_pads_have_no_loss():
    model, tokens = small_model(), ids(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :3], mask[1, 7:] = 0, 0
    expected = summed_loss(model, [tokens[0, 3:], tokens[1, :7]])
    assert_close(model.loss(tokens, attention_mask=mask)[0], expected)


def test_no_document_predicts_the_next_one():
    model, lengths = small_model(), [5, 1, 7]
    tokens = ids(1, 13)
    loss, state = model.loss(tokens, cu_seqlens=borders_of(lengths))
    assert_close(loss, summed_loss(model, list(tokens[0].split(lengths))))
    assert state.position.tolist() == lengths


def test_loss_continues_a_state_with_gradient():
    model, tokens = small_model(), ids(2, 12)
    logits, _ = model(tokens)
    _, state = model(tokens[:, :7])
    loss, _ = model.loss(tokens[:, 7:], state=state)
    expected = F.cross_entropy(logits[:, 7:-1].flatten(0, 1), tokens[:, 8:].flatten())
    assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)), strict=True):
        assert_close(a, b, EXACT)


def test_loss_is_at_least_float32():
    model = small_model().bfloat16()
    loss, _ = model.loss(ids(2, 9))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Bad input


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        (torch.ones(2, 3), TypeError, "input_ids must be an int32 or int64 tensor, not torch.float32"),
        ([[1, 2]], TypeError, "not list"),
        (torch.ones(3, dtype=torch.long), ValueError, r"shape \(3,\); expected \[B, T\]"),
        (torch.tensor([[0, 11]]), ValueError, r"token id 11 is outside the vocabulary 0 … 10"),
        (torch.tensor([[-1, 3]]), ValueError, "token id -1 is outside"),
        (torch.ones(2, 0, dtype=torch.long), ValueError, "no tokens"),
    ],
)
def test_bad_ids(tokens, error, match):
    with pytest.raises(error, match=match):
        small_model()(tokens)


def test_bad_states():
    model, tokens = small_model(), ids(2, 5)
    _, state = model(tokens)
    with pytest.raises(TypeError, match="state must be a ModelState, not MemoryState"):
        model(tokens, state.layers[0])
    with pytest.raises(ValueError, match="the state has 4 layers but the model has 8"):
        small_model(num_hidden_layers=8)(tokens, state)
    with pytest.raises(ValueError, match="the state holds 2 documents but the input has 3"):
        model(ids(3, 5), state)


def test_bad_labels():
    model, tokens = small_model(), ids(2, 5)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\) but the input has \(2, 5\)"):
        model.loss(tokens, tokens[:, 1:])
    with pytest.raises(TypeError, match=r"labels .* not torch.float32"):
        model.loss(tokens, tokens.float())
    with pytest.raises(ValueError, match="no token has a target"):
        model.loss(tokens, torch.full_like(tokens, -100))
    with pytest.raises(ValueError, match="no token has a target"):
        model.loss(tokens[:, :1])
    with pytest.raises((IndexError, ValueError), match=r"(?i)target|label"):
        model.loss(tokens, tokens + VOCABULARY)


def test_a_model_takes_a_configuration():
    with pytest.raises(TypeError, match="a model takes a ModelConfig, not MemoryConfig"):
        LanguageModel(MemoryConfig())
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 7\); expected \[B, T, D\] with D = 100"):
        SequenceModel(GPT2)(torch.ones(2, 5, 7))


def test_a_batch_of_pads_changes_nothing():
    model = small_model()
    nothing = torch.zeros(2, 5)
    logits, state = model(ids(2, 5), attention_mask=nothing)
    assert logits.shape == (2, 5, VOCABULARY)
    assert state.position.tolist() == [0, 0]
    _, before = model(ids(2, 7))
    _, after = model(ids(2, 5), before, attention_mask=nothing)
    for mine, theirs in zip(after.layers, before.layers, strict=True):
        for name, part in theirs.tensors().items():
            assert torch.equal(mine.tensors()[name], part), name


def test_another_backend_computes_the_same_and_is_not_saved() -> None:
    model, tokens = small_model(), ids(2, 13)
    expected, state = model(tokens)
    model.use_backend("reference")
    assert {layer.config.backend for layer in model.modules() if isinstance(layer, HybridMemory)} == {"reference"}
    actual, again = model(tokens)
    assert_close(actual, expected)
    for a, b in zip(again.layers, state.layers, strict=True):
        for name, x in b.tensors().items():
            assert_close(a.tensors()[name], x)
    assert {memory.backend for memory in model.config.memories} == {"auto"}
    with pytest.raises(ValueError, match="backend='cuda'"):
        model.use_backend("cuda")
