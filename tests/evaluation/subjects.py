"""Small models of every kind, and local copies of the evaluation sets, a few items each, in the schema of the Hub."""

import json
from pathlib import Path

import torch
from torch import nn

from hqlt import LanguageModel, MemoryConfig, ModelConfig
from hqlt.evaluation.subject import Subject
from hqlt.models.files import fingerprint, save_model

WINDOW = 5
KINDS = {
    "transformer": {"update_rule": None, "window": None},
    "deltanet": {"kv_memory": False, "window": None},
    "synchronous": {"schedule": "synchronous", "window": WINDOW},
    "delayed_streaming": {"schedule": "delayed_streaming", "window": WINDOW},
    "delayed_chunk": {"schedule": "delayed_chunk", "window": WINDOW},
}

ROWS = {
    "wikitext": [
        {"page": " = Owls = \n \n An owl @-@ like bird , in 1 @,@ 234 places . \n = = Food = = \n It eats mice . \n "},
        {"page": " = Ärger = \n \n Naïve people ' s troubles ( some ) . \n"},
    ],
    "lambada_openai": [
        {"text": "She gave the letter to the tall man and then thanked the man"},
        {"text": 'He said : "I have never been to Zürich"'},
        {"text": "two words"},
    ],
    "piqa": [
        {"goal": "How do I cool soup?", "sol1": "Freeze it for a long week.", "sol2": "Wait.", "label": 1},
        {"goal": "Öffne", "sol1": "ü é ñ", "sol2": "a longer answer", "label": 0},
        {"goal": "Cut wood", "sol1": "with a saw", "sol2": "with a sew", "label": 0},
    ],
    "hellaswag": [
        {
            "activity_label": "Roof work",
            "ctx_a": "A man is on a roof.",
            "ctx_b": "he",
            "endings": ["takes a nap.", "falls.", "rips tiles off and puts them down.", "sings [loudly]."],
            "label": "2",
        },
        {
            "activity_label": "Food",
            "ctx_a": "How to boil eggs. Put water in a pot.",
            "ctx_b": "",
            "endings": ["Wait.", "Drink it all at once, quickly.", "Run away.", "Add eggs and wait."],
            "label": "3",
        },
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bo because _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"sentence": "The cup is on the tray, so the _ is below.", "option1": "tray", "option2": "cup", "answer": "1"},
        {"sentence": "Max met Sam. Then _ left.", "option1": "Max", "option2": "Sam", "answer": "1"},
    ],
    "arc_easy": [
        {
            "question": "What do plants need?",
            "choices": {"text": ["light", "a car", "nothing at all", "paper"], "label": ["A", "B", "C", "D"]},
            "answerKey": "A",
        },
        {
            "question": "Which is largest?",
            "choices": {"text": ["a mouse", "an elephant", "a cat"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ],
    "arc_challenge": [
        {
            "question": "What melts ice?",
            "choices": {"text": ["heat", "wind", "darkness", "salt water"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        }
    ],
    "squad_completion": [
        {"text": "  The tower is in aaa. The tower is in ", "value": " AA "},
        {"text": "Nobody knows the answer, which is", "value": "no(thing"},
    ],
    "swde": [{"text": "Title: X\nDirector: Y\nDirector:\n", "value": "Y"}, {"text": "aa b", "value": "aaa"}],
    "fda": [
        {"text": "Device: K123456. Type: assay. Device:", "key": "device", "value": "K123456"},
        {"text": "one. x:", "key": "x", "value": "one"},
    ],
}  # fmt: skip


def small_model(kind: str, seed: int = 0, vocab_size: int = 256, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Two layers with weights large enough that every token matters."""
    torch.manual_seed(seed)
    memory = MemoryConfig(hidden_size=16, num_heads=2, **KINDS[kind])
    config = ModelConfig(vocab_size=vocab_size, num_hidden_layers=2, memory=memory, initializer_range=0.4)
    return LanguageModel(config).to(dtype).eval().requires_grad_(False)


def unigram_model(logits: torch.Tensor) -> LanguageModel:
    """A model that predicts the same distribution everywhere."""
    model = small_model("synchronous", vocab_size=len(logits))
    head = nn.Linear(16, len(logits), dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(logits)
    model.head = head
    return model


def subject(model: LanguageModel, folder: Path, trained_length: int | None = None) -> Subject:
    return Subject(model, folder, fingerprint(model), trained_length)


def write_rows(folder: Path, **rows: list[dict]) -> Path:
    """A folder with TASK.jsonl for each, or for all tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, items in (rows or ROWS).items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    return folder


def saved(model: LanguageModel, folder: Path) -> Path:
    save_model(model, folder)
    return folder
