"""Models of any configuration whose costs are compared with what happens."""

from hypothesis import strategies as st

from hqlt import MemoryConfig, ModelConfig
from hqlt.config import MIXERS

WIDTH = 24


def memory_of(**options: object) -> MemoryConfig:
    return MemoryConfig(**{"hidden_size": WIDTH, "num_heads": 2, "window": 5, **options})


@st.composite
def memories(draw: st.DrawFn) -> MemoryConfig:
    rule = draw(st.sampled_from([None, "delta", "gated_delta", "linear"]))
    options = {
        "update_rule": rule,
        "num_heads": draw(st.sampled_from([1, 2, 3])),
        "expand_k": draw(st.sampled_from([0.5, 1.0, 1.5])),
        "expand_v": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "output_gate": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "short_convolution": draw(st.booleans()),
    }
    if options["short_convolution"]:
        options["conv_size"] = draw(st.sampled_from([2, 4]))
    if rule is not None and draw(st.sampled_from([False, False, True])):
        return memory_of(**options, kv_memory=False, window=None, position_encoding="none")
    options["position_encoding"] = draw(st.sampled_from(["rope", "none"]))
    if rule is None:
        return memory_of(**options, window=draw(st.sampled_from([None, 1, 5, 8])))
    options |= draw(
        st.sampled_from(
            [
                {"window": None},
                {},
                {"schedule": "delayed_streaming"},
                {"schedule": "delayed_chunk"},
                {"schedule": "overlap", "window": 6, "delay": 4},
                {"schedule": "overlap", "window": 6, "delay": 6},
            ]
        )
    )
    return memory_of(**options, mixer=draw(st.sampled_from(MIXERS)))


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    pattern = draw(st.lists(memories(), min_size=1, max_size=2))
    return ModelConfig(
        vocab_size=draw(st.sampled_from([1, 13])),
        num_hidden_layers=2,
        memory=tuple(pattern),
        mlp=draw(st.sampled_from(["swiglu", "gelu", ("swiglu", "none"), ("none", "gelu")])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        intermediate_size=draw(st.sampled_from([10, 37])),
        tie_embeddings=draw(st.booleans()),
    )
