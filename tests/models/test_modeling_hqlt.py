"""The adapters to transformers against the plain model and against themselves without a cache."""

import copy
import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    TextStreamer,
    Trainer,
    TrainingArguments,
)

import hqlt
from hqlt import Decoder, HQLTCache, HQLTConfig, HQLTForCausalLM, HQLTModel, LanguageModel, MemoryConfig, ModelConfig
from hqlt.models import language_model
from tests.helpers import assert_close, borders_of

VOCABULARY, PAD, END = 37, 0, 1
HYBRID = (
    MemoryConfig(hidden_size=16, window=4, schedule="delayed_streaming", update_rule="gated_delta"),
    MemoryConfig(hidden_size=16, update_rule=None, window=None),
    MemoryConfig(hidden_size=16, kv_memory=False, short_convolution=True),
    MemoryConfig(hidden_size=16, window=3, schedule="delayed_chunk", update_rule="linear"),
)
SCHEDULES = {
    "synchronous": {},
    "delayed_streaming": {"schedule": "delayed_streaming"},
    "delayed_chunk": {"schedule": "delayed_chunk"},
    "overlap": {"schedule": "overlap", "delay": 2},
}
MEMORIES = {
    f"{schedule}-{rule}-{position}": MemoryConfig(
        hidden_size=16, window=5, update_rule=rule, position_encoding=position, **options
    )
    for (schedule, options), rule, position in product(
        SCHEDULES.items(), ("delta", "gated_delta", "linear"), ("rope", "none")
    )
} | {"four kinds": HYBRID}


def make(memory=HYBRID, seed: int = 3, **options) -> HQLTForCausalLM:
    torch.manual_seed(seed)
    layers = len(memory) if isinstance(memory, tuple) else 2
    config = HQLTConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        memory=memory,
        **{"initializer_range": 0.4, **options},
    )
    return HQLTForCausalLM(config).eval()


def ids(batch: int, length: int) -> torch.Tensor:
    """Tokens other than pad and end."""
    return torch.randint(2, VOCABULARY, (batch, length))


GREEDY = {"do_sample": False, "max_new_tokens": 8}


def never_ending(**options) -> GenerationConfig:
    return GenerationConfig(**{"do_sample": False, "max_new_tokens": 12, **options})


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts [T] as a left-padded batch."""
    longest = max(len(p) for p in prompts)
    rows = [torch.cat([torch.full((longest - len(p),), PAD), p]) for p in prompts]
    mask = [torch.arange(longest) >= longest - len(p) for p in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(mask).long()}


# Configuration, files


def test_a_seed_gives_the_weights_of_the_plain_model():
    adapter = make(seed=5)
    torch.manual_seed(5)
    plain = LanguageModel(adapter.config.model)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), plain.parameters(), strict=True))
    assert adapter.config.hidden_size == 16
    assert adapter.config.num_attention_heads == 2
    assert adapter.config.model == plain.config


@pytest.mark.parametrize("tie", [False, True])
def test_saved_in_shards_and_loaded_by_the_auto_classes(tmp_path, tie):
    model = make(tie_word_embeddings=tie)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HQLTConfig)
    assert config.model == model.config.model
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        HQLTForCausalLM.from_pretrained(tmp_path, device_map="cpu"),
        HQLTForCausalLM.from_pretrained(tmp_path, device_map="auto"),
    ):
        assert isinstance(loaded, HQLTForCausalLM)
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
        assert (loaded.model.head.weight is loaded.model.embedding.weight) == tie
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, HQLTModel)
    tokens = ids(2, 9)
    hidden = base(tokens).last_hidden_state
    assert torch.equal(hidden, model.model.hidden_states(tokens)[0])


@pytest.mark.parametrize("tie", [False, True])
def test_plain_models_read_and_write_the_same_folders(tmp_path, tie):
    model, tokens = make(tie_embeddings=tie), ids(2, 9)
    model.save_pretrained(tmp_path / "adapter", max_shard_size="10KB")
    plain = hqlt.load_model(tmp_path / "adapter")
    assert torch.equal(plain(tokens)[0], model(tokens).logits)
    hqlt.save_model(plain, tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert isinstance(again, HQLTForCausalLM)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_with_missing_weights_gets_new_ones_for_those_only(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("model.head.weight", "model.blocks.0.memory.output_proj.weight", "model.blocks.2.memory_norm.weight"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = HQLTForCausalLM.from_pretrained(tmp_path)
    state, expected = loaded.state_dict(), model.state_dict()
    for name in expected:
        assert torch.equal(state[name], expected[name]) == (name in weights or name.endswith("norm.weight")), name
    assert state["model.blocks.0.memory.output_proj.weight"].abs().max() <= 16**-0.5 / 8**0.5
    assert state["model.head.weight"].std() > 0.3


def test_around_a_plain_model():
    mlp = ("swiglu", "none")
    plain = LanguageModel(ModelConfig(vocab_size=VOCABULARY, num_hidden_layers=4, memory=HYBRID, mlp=mlp)).eval()
    adapter = HQLTForCausalLM.of(plain, eos_token_id=END)
    assert adapter.model is plain
    assert not adapter.training
    tokens = ids(2, 5)
    assert torch.equal(adapter(tokens).logits, plain(tokens)[0])
    assert adapter.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_bad_configurations():
    with pytest.raises(ValueError, match="window is a field of the memory; set it by memory=MemoryConfig"):
        HQLTConfig(window=16)
    with pytest.raises(ValueError, match="hidden_size is a field of the memory"):
        HQLTConfig().hidden_size = 32
    with pytest.raises(ValueError, match="hiden_ratio is unknown; did you mean hidden_ratio"):
        HQLTConfig(hiden_ratio=2.0)
    with pytest.raises(ValueError, match="tie_embeddings=False contradicts tie_word_embeddings=True"):
        HQLTConfig(tie_word_embeddings=True, tie_embeddings=False)
    with pytest.raises(ValueError, match="schedule='now' is unknown"):
        HQLTConfig(memory={"schedule": "now"})
    with pytest.raises(ValueError, match="vocab_size=0 must be at least 1"):
        HQLTConfig(vocab_size=0)


def test_a_damaged_folder(tmp_path):
    make().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|[Cc]orrupt|deserializ"):
        HQLTForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        hqlt.load_model(tmp_path)


@pytest.mark.parametrize(
    "memory", [HYBRID, MemoryConfig(hidden_size=16, window=4, short_convolution=True)], ids=["hybrid", "conv"]
)
def test_weights_on_disk_are_loaded_where_they_are_used(memory, tmp_path):
    model, tokens = make(memory), ids(1, 9)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    loaded = HQLTForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert loaded.model.head.weight.device.type == "meta"
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))


def test_a_whole_file_beside_older_shards(tmp_path):
    make().save_pretrained(tmp_path, max_shard_size="10KB")
    model = make(seed=9)
    model.save_pretrained(tmp_path)
    tokens = ids(1, 5)
    assert torch.equal(hqlt.load_model(tmp_path)(tokens)[0], model(tokens).logits)


def test_a_memory_given_as_a_configuration_is_saved_as_json(tmp_path):
    model = make(MemoryConfig(hidden_size=16, window=5))
    model.save_pretrained(tmp_path)
    other = HQLTForCausalLM.from_pretrained(tmp_path, memory=MemoryConfig(hidden_size=16, window=9))
    assert other.config.model.memory.window == 9
    other.config.memory = HYBRID[:2]
    assert [entry["window"] for entry in json.loads(other.config.to_json_string())["memory"]] == [4, None]


# Forward


def test_forward_is_the_plain_model():
    model, tokens = make(), ids(3, 11)
    out = model(tokens, output_hidden_states=True)
    expected, state = model.model(tokens)
    assert torch.equal(out.logits, expected)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, expected)
    assert len(out.hidden_states) == 5
    assert torch.equal(model.model.head(out.hidden_states[-1]), expected)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert out.cache.get_seq_length() == 11
    for mine, theirs in zip(out.cache.state.layers, state.layers, strict=True):
        assert all(torch.equal(x, theirs.tensors()[name]) for name, x in mine.tensors().items())
    assert_close(model(tokens, logits_to_keep=1).logits, expected[:, -1:], 1e-6)
    assert_close(model(tokens, logits_to_keep=torch.tensor([2, 7])).logits, expected[:, [2, 7]], 1e-6)
    assert torch.equal(model(tokens, return_dict=False)[0], expected)
    assert model(tokens, use_cache=False).cache is None


def test_hidden_states_of_padded_rows_lie_where_the_tokens_do():
    model = make().double()
    batch = padded([ids(1, n)[0] for n in (4, 9, 7)])
    layers = model(**batch, output_hidden_states=True).hidden_states
    assert {h.shape for h in layers} == {(3, 9, 16)}
    alone = model(batch["input_ids"][2:, 2:], output_hidden_states=True).hidden_states
    for mine, theirs in zip(layers, alone, strict=True):
        assert_close(mine[2:, 2:], theirs)


def test_the_loss_and_its_gradient():
    model, tokens = make().double(), ids(3, 11)
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    batch = {"input_ids": tokens, "attention_mask": padded([ids(1, n)[0] for n in (11, 4, 8)])["attention_mask"]}
    expected, _ = model.model.loss(tokens, labels, attention_mask=batch["attention_mask"])
    out = model(**batch, labels=labels)
    assert_close(out.loss, expected)
    assert out.logits.shape == (3, 11, VOCABULARY)
    summed = model(**batch, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    targets = language_model.shifted(labels, (3, 11), batch["attention_mask"])
    assert_close(summed, expected * (targets != -100).sum() / 7)
    model.train()
    trained = model(**batch, labels=labels)
    assert trained.logits is None
    assert trained.cache is None
    assert model(**batch, labels=labels, skip_logits=False).logits is not None


@pytest.mark.parametrize("pieces", [1, 4, 100])
def test_pieces_of_logits_change_nothing(pieces, monkeypatch):
    model, tokens = make().double().train(), ids(2, 23)
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters()))
    monkeypatch.setattr(language_model, "LOGITS_BYTES", 4 * VOCABULARY * max(1, 44 // pieces))
    loss = model(tokens, labels=tokens).loss
    assert_close(loss, model.model.loss(tokens)[0])
    for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing_but_memory():
    model, tokens = make(dropout=0.2).double().train(), ids(2, 23)

    def gradients() -> tuple[list[torch.Tensor], int]:
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss = model(tokens, labels=tokens).loss
        return torch.autograd.grad(loss, list(model.parameters())), sum(kept)

    expected, plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    actual, less = gradients()
    assert less < plain / 4
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs)
    model.gradient_checkpointing_disable()
    assert gradients()[1] == plain


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY - 5, VOCABULARY + 6])
def test_resized_vocabulary(tie, size, tmp_path):
    model, tokens = make(tie_embeddings=tie), ids(1, 9).clamp(max=VOCABULARY - 6)
    before = model(tokens).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.model.config.vocab_size == size
    assert model(tokens).logits.shape[-1] == size
    common = min(size, VOCABULARY)
    assert torch.equal(model(tokens).logits[..., :common], before[..., :common])
    assert (model.model.head.weight is model.model.embedding.weight) == tie
    with pytest.raises(ValueError, match=f"token id {size} is outside the vocabulary"):
        model(torch.tensor([[size]]))
    model.save_pretrained(tmp_path)
    assert torch.equal(HQLTForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_packed_documents():
    model, tokens = make().double(), ids(1, 20)
    packed = model(tokens, labels=tokens, cu_seq_lens_q=borders_of([7, 1, 12]))
    assert_close(packed.logits[:, 8:], model(tokens[:, 8:]).logits)
    losses = [model(tokens[:, a:b], labels=tokens[:, a:b]).loss * (b - a - 1) for a, b in ((0, 7), (8, 20))]
    assert_close(packed.loss, sum(losses) / 17)


@pytest.mark.parametrize(("flash", "position_ids"), [(True, True), (True, False), (False, True)])
def test_packed_by_the_collator_of_transformers(flash, position_ids):
    model, rows = make().double(), [ids(1, n)[0] for n in (7, 1, 12)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_position_ids=position_ids)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    out = model(**batch)
    assert_close(out.logits[:, 8:], model(rows[2][None]).logits)
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in (rows[0], rows[2])]
    assert_close(out.loss, sum(losses) / 17)


def test_a_micro_batch_without_a_target():
    model, tokens = make().train(), ids(2, 5)
    nothing = torch.full_like(tokens, -100)
    loss = model(tokens, labels=nothing, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0
    assert all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert model(tokens, labels=nothing).loss.isnan()


def test_training_over_segments_of_a_text():
    model, tokens, cache = make().double().train(), ids(1, 12), HQLTCache()
    first = model(tokens[:, :6], labels=tokens[:, :6], cache=cache)
    assert first.cache is cache
    assert cache.get_seq_length() == 6
    second = model(tokens[:, 6:], cache=cache, skip_logits=False)
    assert_close(second.logits, model(tokens, use_cache=False).logits[:, 6:])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile():
    model, tokens = make(MEMORIES["delayed_streaming-delta-rope"]), ids(2, 9)
    assert_close(torch.compile(model, backend="eager")(tokens).logits, model(tokens).logits, 1e-6)


# Generation


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_cached_logits_are_uncached_logits(memory):
    model, prompt = make(memory), ids(2, 7)
    out = model.generate(
        prompt, never_ending(max_new_tokens=16, output_logits=True, return_dict_in_generate=True)
    )  # fmt: skip
    whole = model(out.sequences[:, :-1], use_cache=False).logits[:, 6:]
    assert_close(torch.stack(out.logits, 1), whole, 1e-5)
    again = model.generate(prompt, never_ending(max_new_tokens=16, use_cache=False))
    assert torch.equal(out.sequences, again)
    assert out.cache.get_seq_length() == 22


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_padded_batch_is_its_rows_alone(memory):
    model, prompts = make(memory), [ids(1, n)[0] for n in (3, 9, 1, 6)]
    options = never_ending(output_logits=True, return_dict_in_generate=True)
    batch = model.generate(**padded(prompts), generation_config=options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], options)
        assert torch.equal(batch.sequences[row, 9:], alone.sequences[0, len(prompt) :])
        assert_close(torch.stack(batch.logits, 1)[row], torch.stack(alone.logits, 1)[0], 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_prefill(chunk):
    model, prompts = make(), [ids(1, n)[0] for n in (13, 8)]
    expected = model.generate(**padded(prompts), generation_config=never_ending())
    actual = model.generate(**padded(prompts), generation_config=never_ending(prefill_chunk_size=chunk))
    assert torch.equal(actual, expected)


def test_turns_of_a_conversation():
    model, turns = make(), [ids(1, 5), ids(1, 4), ids(1, 1)]
    cache, text = HQLTCache(), torch.empty(1, 0, dtype=torch.long)
    for turn in turns:
        text = torch.cat([text, turn], 1)
        expected = model.generate(text, never_ending())
        answer = model.generate(text, never_ending(), cache=cache)
        assert torch.equal(answer, expected)
        assert cache.get_seq_length() == answer.shape[1] - 1
        text = answer


def test_a_fork_goes_its_own_way():
    model, prompt, first, second = make(), ids(2, 6), ids(2, 3), ids(2, 2)
    cache = model(prompt).cache
    forks = [copy.deepcopy(cache), HQLTCache(cache.state, cache.get_seq_length())]
    for fork, turn in zip(forks, (first, second), strict=True):
        text = torch.cat([prompt, turn], 1)
        assert torch.equal(model.generate(text, never_ending(), cache=fork), model.generate(text, never_ending()))
    assert cache.get_seq_length() == 6
    assert forks[0].get_seq_length() == 20


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3}]
)
def test_beam_search(options):
    model, prompts = make(), [ids(1, n)[0] for n in (4, 9)]
    end = int(model.generate(prompts[0][None], never_ending(**options))[0, 8])
    cached, uncached = (
        model.generate(
            **padded(prompts),
            generation_config=never_ending(eos_token_id=end, pad_token_id=PAD, use_cache=flag, **options),
        )
        for flag in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert end in cached[:, 9:]


def test_sampling_constraints_and_stopping():
    model, prompt = make(), ids(2, 6)

    def sample(**options):
        torch.manual_seed(0)
        return model.generate(prompt, never_ending(do_sample=True, top_p=0.9, temperature=1.3, **options))

    free = sample(use_cache=False)
    assert torch.equal(sample(), free)
    banned = free[0, 7].item()
    assert banned not in sample(bad_words_ids=[[banned]])[:, 6:]
    repeated = model.generate(prompt, never_ending(no_repeat_ngram_size=1))[0]
    assert len(set(repeated.tolist())) == len(set(prompt[0].tolist())) + 12
    stop = model.generate(prompt[:1], never_ending())[0, 6:].tolist()
    ended = model.generate(prompt[:1], never_ending(eos_token_id=stop[3]))[0, 6:].tolist()
    assert ended == stop[: stop.index(stop[3]) + 1]
    assert model.generate(prompt, never_ending(num_return_sequences=3, do_sample=True)).shape == (6, 18)


def test_streaming():
    class Words:
        def decode(self, tokens, **_):
            return "".join(f"{int(token)} " for token in tokens)

    class Collect(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    model, prompt, streamer = make(), ids(1, 6), Collect(Words(), skip_prompt=True)
    expected = model.generate(prompt, never_ending())[0, 6:].tolist()
    model.generate(prompt, never_ending(), streamer=streamer)
    assert [int(word) for word in streamer.text.split()] == expected


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_speculative_decoding_is_greedy_decoding(memory):
    model, draft, prompt = make(memory), make(seed=4), ids(1, 9)
    expected = model.generate(prompt, never_ending(max_new_tokens=30))
    kept = HQLTCache()
    for options in (
        {"assistant_model": draft},
        {"assistant_model": copy.deepcopy(model)},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "cache": kept},
    ):
        assert torch.equal(
            model.generate(prompt, do_sample=False, max_new_tokens=30, **options),
            expected,
        )
    more = torch.cat([expected, ids(1, 3)], 1)
    assert torch.equal(model.generate(more, never_ending(), cache=kept), model.generate(more, never_ending()))


@pytest.mark.parametrize("name", ["synchronous-delta-rope", "delayed_chunk-gated_delta-none", "four kinds"])
def test_speculative_turns_of_a_conversation(name):
    model, draft, sizes = make(MEMORIES[name]), make(seed=4), []
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        cache, text = HQLTCache(), torch.empty(1, 0, dtype=torch.long)
        for turn in (ids(1, 6), ids(1, 3), ids(1, 1)):
            text = torch.cat([text, turn], 1)
            expected = model.generate(text, **GREEDY)
            text = model.generate(text, **GREEDY, **options, cache=cache)
            assert torch.equal(text, expected)
            assert cache.get_seq_length() == text.shape[1] - 1
            assert not cache.is_croppable
            sizes.append(cache.state.num_bytes)
    if name != "four kinds":
        assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("name", ["synchronous-delta-rope", "delayed_chunk-gated_delta-none"])
def test_steps_of_a_decoder(name):
    model, prompts = make(MEMORIES[name]), [ids(1, n)[0] for n in (3, 9)]
    expected = model.generate(**padded(prompts), generation_config=never_ending())
    cache = HQLTCache(decoder=Decoder(model.model, compile=False))
    assert torch.equal(model.generate(**padded(prompts), generation_config=never_ending(), cache=cache), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert cache._load is not None
    plain = model(expected[1:, :-1]).cache.state
    for mine, theirs in zip(cache.state.select(torch.tensor([1])).layers, plain.layers, strict=True):
        assert_close(mine.fast_weight, theirs.fast_weight, 1e-5)
    beams = model.generate(**padded(prompts), generation_config=never_ending(num_beams=3))
    cache = HQLTCache(decoder=Decoder(model.model, compile=False))
    assert torch.equal(
        model.generate(**padded(prompts), generation_config=never_ending(num_beams=3), cache=cache), beams
    )


def test_a_decoder_serves_one_cache_at_a_time():
    model, prompt = make(MEMORIES["synchronous-delta-rope"]), ids(1, 4)
    decoder = Decoder(model.model, compile=False)
    caches = [HQLTCache(decoder=decoder), HQLTCache(decoder=decoder)]
    for cache in caches:
        model.generate(prompt, never_ending(), cache=cache)
    with pytest.raises(RuntimeError, match="the decoder was given to another text meanwhile"):
        _ = caches[0].state
    fork = copy.deepcopy(caches[1])
    text = model.generate(prompt, never_ending())
    for cache in (fork, caches[1]):
        again = model.generate(torch.cat([text, prompt], 1), never_ending(), cache=cache)
        assert torch.equal(again, model.generate(torch.cat([text, prompt], 1), never_ending()))
    length = caches[1].get_seq_length()
    assert model(prompt[:, :1], cache=caches[1], use_cache=False).cache is None
    assert caches[1].get_seq_length() == length
    stranger = HQLTCache(decoder=Decoder(make(MEMORIES["synchronous-delta-rope"], 9).model, compile=False))
    with pytest.raises(ValueError, match="the decoder of the cache belongs to another model"):
        model.generate(prompt, never_ending(), cache=stranger)


# Errors


def test_old_name_of_the_cache():
    """What was written for transformers before 5.24, which called the cache past_key_values."""
    model, tokens = make(), ids(2, 9)
    cache = model(tokens[:, :6]).past_key_values
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        after = model(tokens[:, 6:8], past_key_values=cache).logits
    assert_close(after, model(tokens[:, :8]).logits[:, 6:], 1e-5)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        text = model.generate(tokens, never_ending(), past_key_values=cache)
    assert torch.equal(text, model.generate(tokens, never_ending()))


def test_what_does_not_fit():
    model, tokens = make(), ids(2, 5)
    with pytest.raises(TypeError, match="must be an HQLTCache, not DynamicCache"):
        model(tokens, cache=DynamicCache())
    other = make(HYBRID[:2])(tokens).cache
    with pytest.raises(ValueError, match="the state has 2 layers but the model has 4"):
        model(tokens, cache=other)
    other = make(MEMORIES["delayed_chunk-delta-rope"])(tokens).cache
    with pytest.raises(ValueError, match="comes from another configuration"):
        make(MEMORIES["synchronous-delta-rope"])(tokens, cache=other)
    cache = model(tokens).cache
    with pytest.raises(ValueError, match="the state holds 2 documents but the input has 3"):
        model(ids(3, 5), cache=cache)
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="has a hole"):
        model(tokens, attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 2))
    with pytest.raises(
        ValueError, match=r"attention_mask has shape \(2, 4\); expected 2 rows and 5 columns for the new"
    ):
        model(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="token id 37 is outside the vocabulary"):
        model(torch.full((1, 2), VOCABULARY))
    with pytest.raises(TypeError, match="int32 or int64"):
        model(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(7, 5\)"):
        model(tokens, attention_mask=torch.ones(7, 5))
    with pytest.raises(TypeError, match="attention_mask must be a tensor, not list"):
        model(tokens, attention_mask=[[1] * 5] * 2)
    with pytest.raises(TypeError, match="labels must be a tensor, not list"):
        model(tokens, labels=tokens.tolist())
    with pytest.raises(ValueError, match="logits_to_keep=-2 must be a number of positions"):
        model(tokens, logits_to_keep=-2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        model(tokens, colour=1)
    with pytest.raises(ValueError, match="position_ids are used to find packed documents only"):
        model(tokens, position_ids=torch.arange(5).expand(2, -1))
    with pytest.raises(ValueError, match="output_attentions: there are no attention weights"):
        model(tokens, output_attentions=True)
    with pytest.raises(TypeError, match="cache must be an HQLTCache, not ModelState"):
        model.generate(tokens, never_ending(), cache=cache.state)
    with pytest.raises(TypeError, match="state must be a ModelState, not HQLTForCausalLM"):
        HQLTCache(model)
    for both in ({}, {"input_ids": tokens, "inputs_embeds": torch.ones(2, 5, 16)}):
        with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
            model(**both)
    with pytest.raises(ValueError, match="cache_implementation='static' is not for this model"):
        model.generate(tokens, never_ending(cache_implementation="static"))


def test_rows_that_ended_are_not_continued():
    model, prompt, cache = make(), ids(2, 5), HQLTCache()
    free = model.generate(prompt, **GREEDY)
    end = next(int(a) for a, b in zip(free[0, 5:9], free[1, 5:9], strict=True) if a not in free[1])
    text = model.generate(prompt, **GREEDY, eos_token_id=end, pad_token_id=PAD, cache=cache)
    text = torch.cat([text, ids(2, 3)], 1)
    with pytest.raises(ValueError, match=r"past tokens of row 0 as real but the cache has read 12: .* start a row"):
        model.generate(text, attention_mask=(text != PAD).long(), **GREEDY, cache=cache)


def test_columns_with_pads_are_not_cropped():
    model, cache = make(), HQLTCache()
    cache.activate_past_recording()
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 8])
    model(ids(2, 8), attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r"crop\(-2\): only the last 0 columns are free of pads"):
        cache.crop(-2)
    for _ in range(3):
        model(ids(2, 1), cache=cache)
    cache.crop(-2)
    assert cache.state.position.tolist() == [7, 9]
    assert cache.get_seq_length() == 9


def test_caches_that_cannot_be_cropped():
    model, tokens = make(), ids(1, 9)
    cache = model(tokens).cache
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="the state is not tracked"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="cannot take back 10 tokens"):
        cache.crop(-10)
    with pytest.raises(ValueError, match=r"crop\(3\): pass the negative number"):
        cache.crop(3)
    cache.crop(-4)
    assert cache.get_seq_length() == 14
    text = torch.cat([tokens, tokens[:, :5]], 1)
    assert_close(model(tokens, cache=cache).logits, model(torch.cat([text, tokens], 1)).logits[:, 14:], 1e-5)


# Fine-tuning


class Rows(torch.utils.data.Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(12) + n) % (VOCABULARY - 2) + 2
        return {"input_ids": row, "labels": row}


def arguments(path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(path),
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        seed=0,
        **{"save_strategy": "no", "per_device_train_batch_size": 8, **options},
    )


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_trainer(tmp_path):
    memory = MemoryConfig(hidden_size=16, window=5)
    model = make(memory, initializer_range=0.02)
    trainer = Trainer(
        model, arguments(tmp_path, num_train_epochs=6, eval_strategy="epoch"), train_dataset=Rows(), eval_dataset=Rows()
    )
    trainer.train()
    curve = losses(trainer)
    assert curve[0] > 3
    assert curve[-1] < 0.5 * curve[0]
    assert abs(trainer.evaluate()["eval_loss"] - curve[-1]) < 0.5
    trainer.save_model(tmp_path / "model")
    tokens = ids(1, 5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_label_smoothing_shifts_the_labels(tmp_path):
    model, tokens = make(), ids(2, 8)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=1e-9))
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    assert_close(loss, model(tokens, labels=tokens).loss, 1e-6)


def test_accumulated_gradients_weigh_tokens_equally(tmp_path):
    class Uneven(Rows):
        def __getitem__(self, n):
            row = super().__getitem__(n)
            return {**row, "labels": row["labels"].masked_fill(torch.arange(12) < n % 13, -100)}

    def trained(**options):
        model = make(MemoryConfig(hidden_size=16, window=5)).double()
        plan = arguments(tmp_path, max_steps=3, optim="sgd", **options)
        Trainer(model, plan, train_dataset=Uneven()).train()
        return model.state_dict()

    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, weight in trained().items():
        assert_close(parts[name], weight, what=name)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens = make(MemoryConfig(hidden_size=16, window=5), initializer_range=0.02), ids(2, 9)
    before = model(tokens).logits
    targets = ["query_proj", "key_proj", "value_proj", "output_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = {name.split(".")[-4] for name, p in lora.named_parameters() if p.requires_grad}
    assert trainable == set(targets)
    assert torch.equal(lora.eval()(tokens).logits, before)
    trainer = Trainer(lora, arguments(tmp_path, num_train_epochs=3), train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = lora.eval()(tokens).logits
    assert not torch.allclose(after, before)
    lora.save_pretrained(tmp_path / "lora")
    fresh = make(MemoryConfig(hidden_size=16, window=5), initializer_range=0.02)
    assert torch.equal(peft.PeftModel.from_pretrained(fresh, tmp_path / "lora")(tokens).logits, after)
    merged = lora.merge_and_unload()
    assert_close(merged(tokens).logits, after, 1e-5)
    assert torch.equal(merged.generate(tokens, never_ending()), merged.generate(tokens, never_ending(use_cache=False)))


def test_json_of_the_configuration_holds_each_field_once():
    values = json.loads(make().config.to_json_string())
    assert "tie_word_embeddings" not in values
    assert "hidden_size" not in values
    assert values["memory"][1]["window"] is None
    assert HQLTConfig.from_dict(values).model == make().config.model
