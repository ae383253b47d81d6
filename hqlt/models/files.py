"""A finished model as a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hqlt.config import ModelConfig
from hqlt.files import atomic, write_text
from hqlt.models.language_model import LanguageModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(model: LanguageModel, directory: Path | str) -> None:
    """Write configuration and weights; each file is whole or absent."""
    directory = Path(directory)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["head.weight"]
    with atomic(directory / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_text(directory / CONFIG, json.dumps(model.config.to_dict(), indent=2) + "\n")


def load_model(directory: Path | str) -> LanguageModel:
    """The model that :func:`save_model` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged or do not fit each other.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; pass a folder that save_model has written")
    try:
        config = ModelConfig.from_dict(json.loads((directory / CONFIG).read_text(encoding="utf-8")))
        weights = load_file(directory / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, TypeError) as error:
        raise ValueError(f"the model in {directory} is damaged: {error}") from error
    with torch.device("meta"):
        model = LanguageModel(config)
    try:
        if config.tie_embeddings:
            if "head.weight" in weights:
                raise RuntimeError("the head is stored apart but the configuration ties it to the embedding")
            if "embedding.weight" in weights:
                weights["head.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{directory / WEIGHTS} does not fit {directory / CONFIG}: {error}") from error
    model.tie_weights()
    return model.requires_grad_().eval()
