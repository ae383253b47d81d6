"""A run's checkpoint as a model that is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hqlt.config import ModelConfig
from hqlt.files import new_folder
from hqlt.models.files import save_model
from hqlt.models.language_model import LanguageModel
from hqlt.models.tokenizer import TOKENIZER
from hqlt.training.claim import RECIPE
from hqlt.training.snapshots import complete, saved_weights


def whole_model(config: ModelConfig, weights: dict[str, Tensor]) -> LanguageModel:
    """The model of an objective's weights."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()}, assign=True)
    model.tie_weights()
    return model


def save_with_tokenizer(model: LanguageModel, directory: Path, target: Path) -> None:
    """Write a model, and the tokenizer of the run that it comes from."""
    save_model(model, target)
    if (directory / TOKENIZER).is_file():
        shutil.copyfile(directory / TOKENIZER, target / TOKENIZER)


def is_run(directory: Path) -> bool:
    """Whether `hqlt train lm` has written this folder."""
    return (directory / RECIPE).is_file()


def export_run(directory: Path, target: Path) -> str:
    """Write the model of a run's newest checkpoint, and its tokenizer, for :func:`hqlt.load_model` and transformers.

    Args:
        directory: of a run, on however many devices it was trained.
        target: new folder.

    Returns:
        what was done, in a sentence.

    Raises:
        FileExistsError: the target is not empty.
        FileNotFoundError: no checkpoint yet.
        ValueError: it cannot be read.
    """
    model, checkpoint = newest_model(directory)
    with new_folder(target) as folder:
        save_with_tokenizer(model, directory, folder)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters of {checkpoint} written to {target}"


def newest_model(directory: Path) -> tuple[LanguageModel, str]:
    """The model of a run's newest checkpoint, and the checkpoint's name.

    Raises:
        FileNotFoundError: no checkpoint yet.
        ValueError: it cannot be read.
    """
    found = complete(directory)
    if not found:
        raise FileNotFoundError(f"{directory} holds no complete checkpoint yet; let the run reach one")
    content = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    return whole_model(ModelConfig.from_dict(content["recipe"]["model"]), saved_weights(found[-1])), found[-1].name
