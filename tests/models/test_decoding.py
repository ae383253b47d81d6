import shutil

import pytest
import torch

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.layers.lesions import lesion
from hqlt.layers.linear import Linear
from hqlt.layers.state import ModelState
from hqlt.models import Decoder
from hqlt.models.generation import generate
from tests.helpers import EXACT, assert_close, only_memory

VOCABULARY = 11
MEMORIES = {
    f"{schedule}-{rule}-{position}": {"schedule": schedule, "update_rule": rule, "position_encoding": position}
    for schedule in ("synchronous", "delayed_streaming", "delayed_chunk")
    for rule in ("delta", "gated_delta", "linear")
    for position in ("rope", "none")
} | {
    "partial overlap": {"schedule": "overlap", "delay": 2},
    "attention": {"update_rule": None},
    "fast weight": only_memory(),
    "fast weight, convolution": only_memory(short_convolution=True),
    "convolution, separate mixer": {"short_convolution": True, "mixer": "dynamic_vector_separate"},
    "bias, output gate, scalar mixer": {"bias": True, "output_gate": True, "mixer": "dynamic_scalar"},
}


def make_model(memory: dict[str, object], **options: object) -> LanguageModel:
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_heads": 2, "window": 5, **memory}
    config = ModelConfig(
        vocab_size=VOCABULARY, num_hidden_layers=2, memory=MemoryConfig(**shape), initializer_range=0.4, **options
    )
    return LanguageModel(config).double().eval()


def ragged_prompt(model: LanguageModel, lengths: list[int]) -> tuple[torch.Tensor, ModelState]:
    """Documents of these lengths, padded left, and the state after them."""
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids, model(ids, attention_mask=mask)[1]


def assert_same_state(actual: ModelState, expected: ModelState) -> None:
    for mine, theirs in zip(actual.layers, expected.layers, strict=True):
        assert mine.tensors().keys() == theirs.tensors().keys()
        for name, part in theirs.tensors().items():
            assert_close(mine.tensors()[name], part, EXACT, name)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@torch.no_grad()
def test_fixed_buffers_change_nothing(memory):
    model = make_model(memory)
    _, state = ragged_prompt(model, [1, 4, 9])
    decoder = Decoder(model, compile=False)
    decoder.load(state)
    for n in range(17):
        ids = torch.randint(VOCABULARY, (3,))
        expected, state = model(ids[:, None], state)
        assert_close(decoder(ids), expected[:, 0], EXACT, f"token {n}")
        assert_same_state(decoder.state, state)


@torch.no_grad()
def test_sinusoidal_positions():
    model = make_model({"position_encoding": "none"}, position_embedding="sinusoidal")
    _, state = ragged_prompt(model, [2, 6])
    decoder = Decoder(model, compile=False)
    decoder.load(state)
    ids = torch.tensor([1, 2])
    assert_close(decoder(ids), model(ids[:, None], state)[0][:, 0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@torch.no_grad()
def test_compiled_steps_agree_and_do_not_mix_models():
    models = [make_model({"schedule": "delayed_chunk"}), make_model({"short_convolution": True})]
    decoders, states = [], []
    for model in models:
        states.append(ragged_prompt(model, [3])[1])
        decoders.append(Decoder(model))
        decoders[-1].load(states[-1])
    for _ in range(7):
        ids = torch.randint(VOCABULARY, (1,))
        for n, (model, decoder) in enumerate(zip(models, decoders, strict=True)):
            expected, states[n] = model(ids[:, None], states[n])
            assert_close(decoder(ids), expected[:, 0])
    assert_same_state(decoders[0].state, states[0])
    # Weights are read at every step.
    for parameter in models[1].parameters():
        parameter.mul_(0.5)
    assert_close(decoders[1](ids), models[1](ids[:, None], states[1])[0][:, 0])
    # Another batch size is another step.
    _, state = ragged_prompt(models[1], [2, 4])
    decoders[1].load(state)
    ids = torch.tensor([3, 4])
    assert_close(decoders[1](ids), models[1](ids[:, None], state)[0][:, 0])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def all_steps(dtype: torch.dtype = torch.float64) -> tuple[LanguageModel, LanguageModel]:
    """A model with layers of all kinds that the kernel decodes, and the same in float64 without kernels."""
    memories = (
        {"window": 3, "schedule": "delayed_streaming", "update_rule": "gated_delta", "short_convolution": True},
        {"window": 3, "schedule": "delayed_chunk", "expand_v": 1.5, "position_encoding": "none"},
        {"window": 4, "schedule": "overlap", "delay": 2, "mixer": "dynamic_scalar"},
        {"window": 2, "update_rule": None},
        only_memory(output_gate=True),
    )
    models = []
    for backend in ("triton", "auto"):
        torch.manual_seed(3)
        shape = {"hidden_size": 8, "num_heads": 1, "backend": backend}
        memory = tuple(MemoryConfig(**shape, **options) for options in memories)
        sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": len(memories)}
        config = ModelConfig(**sizes, memory=memory, initializer_range=0.4, position_embedding="sinusoidal")
        models.append(LanguageModel(config).to(dtype).eval())
    return models[0].to(DEVICE), models[1].double()


@torch.no_grad()
def test_kernel_steps_change_nothing():
    model, exact = all_steps()
    _, first = ragged_prompt(exact, [1, 6])
    kept = first.map(torch.clone)
    decoder, state, shown = Decoder(model), first, []
    decoder.load(state)
    for n in range(9):
        ids = torch.randint(VOCABULARY, (2,))
        expected, state = exact(ids[:, None], state)
        assert_close(decoder(ids).cpu(), expected[:, 0], EXACT, f"token {n}")
        shown.append((decoder.state.map(torch.Tensor.cpu), decoder.state, state))
    # Later steps change what the decoder holds, never a state that it took or gave.
    for mine, held, theirs in shown:
        assert_same_state(mine, theirs)
        assert_same_state(held.map(torch.Tensor.cpu), theirs)
    assert_same_state(first, kept)
    decoder.load(first)
    expected, _ = exact(ids[:, None], first)
    assert_close(decoder(ids).cpu(), expected[:, 0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_kernel_steps_in_other_dtypes(dtype, tolerance):
    model, exact = all_steps(dtype)
    decoder = Decoder(model)
    decoder.load(model.empty_state(1))
    ids = torch.randint(VOCABULARY, (4,))
    found = torch.stack([decoder(token.view(1))[0] for token in ids])
    assert found.dtype == dtype
    assert_close(found.cpu(), exact(ids[None])[0][0], tolerance)


@torch.no_grad()
def test_lesions_and_kernel_steps():
    model, exact = make_model({"backend": "triton"}).to(DEVICE), make_model({})
    decoder = Decoder(model, compile=False)
    _, state = ragged_prompt(exact, [4])
    decoder.load(state)
    ids = torch.tensor([3])
    with lesion(model, kv=True), lesion(exact, kv=True):
        with pytest.raises(ValueError, match=r"began since load\(\)"):
            decoder(ids)
        decoder.load(state)
        assert_close(decoder(ids).cpu(), exact(ids[:, None], state)[0][:, 0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on this machine")
def test_kernel_steps_without_a_device(monkeypatch):
    model, exact = all_steps()
    decoder = Decoder(model)
    decoder.load(ragged_prompt(exact, [4])[1])
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="cannot run on cpu"):
        decoder(torch.tensor([3]))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "graph"])
@torch.no_grad()
def test_steps_on_a_device(compile):
    model, exact = all_steps(torch.float32)
    decoder = Decoder(model, compile=compile)
    for _ in range(2):  # other documents by the same graph, which sees weights that change in place
        _, state = ragged_prompt(exact, [2, 5, 9])
        decoder.load(state)
        for token in torch.randint(VOCABULARY, (9, 3)):
            expected, state = exact(token[:, None], state)
            assert_close(decoder(token.cuda()).cpu(), expected[:, 0], 1e-4)
        for parameter in (*model.parameters(), *exact.parameters()):
            parameter.mul_(0.9)
    for parameter in model.parameters():
        parameter.data = 0.9 * parameter
    for parameter in exact.parameters():
        parameter.mul_(0.9)
    _, state = ragged_prompt(exact, [2, 5, 9])
    decoder.load(state)
    assert_close(decoder(token.cuda()).cpu(), exact(token[:, None], state)[0][:, 0], 1e-4)


def test_generation_with_a_decoder():
    model = make_model({})
    prompt = torch.randint(VOCABULARY, (7,))
    decoder = Decoder(model, compile=False)
    for seed in (0, 1):  # a decoder serves several texts
        expected = list(generate(model, prompt, 12, seed=seed))
        assert list(generate(model, prompt, 12, seed=seed, decoder=decoder)) == expected
    with pytest.raises(ValueError, match="another model"):
        generate(make_model({}), prompt, 3, decoder=decoder)


@torch.no_grad()
def test_states_and_ids_of_other_types():
    model = make_model({"schedule": "delayed_chunk", "update_rule": "gated_delta"}).float()
    ids, _ = ragged_prompt(model, [6, 6])
    with torch.autocast("cpu", torch.bfloat16):
        _, low = model(ids)
    assert low.layers[0].key.dtype == torch.bfloat16
    decoder = Decoder(model, compile=False)
    decoder.load(low)
    expected, _ = model(ids[:, :1], low)
    assert_close(decoder(ids[:, 0].int()), expected[:, 0], 1e-5)
    before = {name: x.dtype for name, x in decoder.state.layers[1].tensors().items()}
    decoder(ids[:, 1])
    assert {name: x.dtype for name, x in decoder.state.layers[1].tensors().items()} == before
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        decoder(ids[:, 0])
    model.double()
    with pytest.raises(ValueError, match="converted"):
        decoder(ids[:, 0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@torch.no_grad()
def test_other_backends(backend):
    model = make_model({"backend": backend})
    _, state = ragged_prompt(model, [4])
    decoder = Decoder(model, compile=False)
    decoder.load(state)
    ids = torch.tensor([3])
    assert_close(decoder(ids), model(ids[:, None], state)[0][:, 0])


def test_texts_do_not_mix():
    model = make_model({})
    decoder = Decoder(model, compile=False)
    first, second = (generate(model, torch.tensor([1, n]), 5, decoder=decoder) for n in (2, 3))
    for text in (first, first, second, second):
        next(text)
    with pytest.raises(RuntimeError, match="another text"):
        next(first)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        generate(model, torch.tensor([1]), 5, decoder=decoder)


def test_clear_errors():
    with pytest.raises(ValueError, match="window=None"):
        Decoder(make_model({"window": None}))
    model = make_model({})
    decoder = Decoder(model, compile=False)
    with pytest.raises(ValueError, match="no state yet"):
        decoder(torch.tensor([1]))
    with pytest.raises(ValueError, match="no state yet"):
        _ = decoder.state
    _, state = ragged_prompt(model, [3, 5])
    with pytest.raises(ValueError, match="1 layers but the model has 2"):
        decoder.load(ModelState(state.layers[:1]))
    with pytest.raises(ValueError, match="another configuration"):
        decoder.load(ragged_prompt(make_model({"update_rule": "linear"}), [3])[1])
    decoder.load(state)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(2,\)"):
        decoder(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="token id 11"):
        decoder(torch.tensor([1, 11]))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        decoder.load(state)


def test_missing_compiler_is_named(monkeypatch):
    model = make_model({})
    decoder = Decoder(model)
    decoder.load(ragged_prompt(model, [2])[1])

    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: none")

    monkeypatch.setattr(decoder, "_step", fail)
    with pytest.raises(RuntimeError, match=r"install g\+\+"):
        decoder(torch.tensor([1]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 6), (6,), (2, 3, 6), (1, 6), (0, 6)])
def test_linear_is_the_linear_of_torch(shape, dtype, bias):
    layer = Linear(6, 8, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(layer(x), expected)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 3, dtype=dtype))
        assert_close(layer(x), expected, 1e-6 if dtype == torch.float32 else EXACT)
        half, expected = layer.bfloat16()(x.bfloat16()), expected.float()
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), expected, 2e-2)
