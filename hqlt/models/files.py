"""A finished model as a folder, `config.json` and `model.safetensors`, that transformers can read and write too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hqlt.config import ModelConfig
from hqlt.files import write_tensors, write_text
from hqlt.models.language_model import LanguageModel

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Under which the adapter of transformers holds the plain model.
PREFIX = "model."
IDENTITY = {"model_type": "hqlt", "architectures": ["HQLTForCausalLM"]}


def save_model(model: LanguageModel, directory: Path | str) -> None:
    """Write configuration and weights; each file is whole or absent. ``hqlt.HQLTForCausalLM`` reads them too."""
    directory = Path(directory)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["head.weight"]
    write_tensors(directory / WEIGHTS, weights, {"format": "pt"})
    (directory / INDEX).unlink(missing_ok=True)
    write_text(directory / CONFIG, json.dumps({**IDENTITY, **model.config.to_dict()}, indent=2) + "\n")


def load_model(directory: Path | str) -> LanguageModel:
    """The model that :func:`save_model` or ``HQLTForCausalLM.save_pretrained`` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged or do not fit each other.
    """
    directory = Path(directory)
    try:
        config = _model_config(read_json(directory / CONFIG))
        weights = {name.removeprefix(PREFIX): x for name, x in read_weights(directory).items()}
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


def _model_config(values: object) -> ModelConfig:
    """Our fields of a configuration; those that transformers adds are its own business."""
    if isinstance(values, dict) and values.get("model_type", "hqlt") != "hqlt":
        raise ValueError(
            f"model_type={values['model_type']!r} is not 'hqlt'; published formats are read by `hqlt convert` and "
            "hqlt.model_from_reference"
        )
    if isinstance(values, dict):
        own = {field.name for field in dataclasses.fields(ModelConfig)}
        by_transformers = "transformers_version" in values
        values = {name: x for name, x in values.items() if name in own or not (by_transformers or name in IDENTITY)}
    return ModelConfig.from_dict(values)  # type: ignore[arg-type]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        json.JSONDecodeError, UnicodeDecodeError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; pass the folder of a model")
    return json.loads(path.read_text(encoding="utf-8"))


def read_index(path: Path) -> list[str]:
    """The names of the files that an index of shards mentions.

    Raises:
        ValueError: it is no index, or names files elsewhere.
    """
    content = read_json(path)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is not an index of shards: it has no weight_map from weights to files")
    elsewhere = [name for name in names.values() if Path(name).name != name]
    if elsewhere:
        raise ValueError(f"{path} names {elsewhere[0]!r}; shards lie beside their index")
    return sorted(set(names.values()))


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder with one `model.safetensors`, or with shards and their index.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged index.
        SafetensorError: a file is truncated or damaged.
    """
    index = directory / INDEX
    # An index beside a whole file is what an older model has left.
    sharded = index.is_file() and not (directory / WEIGHTS).is_file()
    weights: dict[str, Tensor] = {}
    for shard in read_index(index) if sharded else [WEIGHTS]:
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{directory} holds no {shard}; pass the folder of a model")
        weights.update(load_file(directory / shard))
    return weights


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
