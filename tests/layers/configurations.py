"""The configurations that the layer tests run over."""

from itertools import product

from tests.helpers import only_memory

SCHEDULES = {
    "synchronous": {},
    "delayed_streaming": {"schedule": "delayed_streaming"},
    "delayed_chunk": {"schedule": "delayed_chunk"},
    "overlap": {"schedule": "overlap", "delay": 3},
    "unbounded": {"window": None},
}
RULES = ("delta", "gated_delta", "linear")
POSITIONS = ("rope", "none")
MIXERS = ("sum", "static_scalar", "dynamic_scalar", "dynamic_vector", "dynamic_vector_separate")

# Schedule x rule x position; the short convolution goes with one of the two position encodings.
PRODUCT = {
    f"{schedule}-{rule}-{position}": {
        **options,
        "update_rule": rule,
        "position_encoding": position,
        "short_convolution": position == "rope",
    }
    for (schedule, options), rule, position in product(SCHEDULES.items(), RULES, POSITIONS)
}

SPECIAL = {
    "fast weight only": only_memory(),
    "fast weight only, gated, conv": only_memory(update_rule="gated_delta", short_convolution=True),
    "fast weight only, linear": only_memory(update_rule="linear"),
    "window attention": {"update_rule": None},
    "full attention": {"update_rule": None, "window": None},
    "full attention, conv, bias": {"update_rule": None, "window": None, "short_convolution": True, "bias": True},
    "convolution of 3": {"short_convolution": True, "conv_size": 3},
    "window of 1": {"window": 1},
    "window of 1, streaming": {"window": 1, "schedule": "delayed_streaming"},
    "window of 1, chunk": {"window": 1, "schedule": "delayed_chunk", "update_rule": "gated_delta"},
    "overlap by nothing": {"schedule": "overlap", "delay": 5},
    "overlap by everything": {"schedule": "overlap", "delay": 0},
    "wide values, narrow keys": {"expand_v": 2.0, "expand_k": 0.5, "schedule": "delayed_chunk"},
    "wide keys": {"expand_k": 2.0, "schedule": "delayed_streaming", "update_rule": "linear"},
    "output gate, negative eigenvalues": {"output_gate": True, "allow_negative_eigenvalues": True},
    "biases": {"bias": True, "schedule": "delayed_streaming", "update_rule": "gated_delta"},
    "published normaliser": {"update_rule": "linear", "linear_normaliser": "published"},
    "published normaliser, chunk": {
        "update_rule": "linear",
        "linear_normaliser": "published",
        "schedule": "delayed_chunk",
    },
    **{f"mixer {mixer}": {"mixer": mixer, "schedule": "delayed_streaming"} for mixer in MIXERS},
}

ALL = {**PRODUCT, **SPECIAL}

# Every mixer too, for the tests that are cheap enough.
FULL_PRODUCT = {
    f"{schedule}-{rule}-{position}-{mixer}": {
        **options,
        "update_rule": rule,
        "position_encoding": position,
        "mixer": mixer,
    }
    for (schedule, options), rule, position, mixer in product(SCHEDULES.items(), RULES, POSITIONS, MIXERS)
}
