"""Folders and files in the published formats and in ours, and from one to the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hqlt.files import new_folder, write_tensors, write_text
from hqlt.models.files import CONFIG, INDEX, WEIGHTS, load_model, read_index, read_json, read_weights, save_model
from hqlt.models.language_model import LanguageModel
from hqlt.models.reference_checkpoints import model_from_reference
from hqlt.models.reference_export import model_to_reference
from hqlt.models.tokenizer import TOKENIZER

PICKLED = "pytorch_model.bin"


def load_published(path: Path | str, config: Path | str | Mapping[str, Any] | None = None) -> LanguageModel:
    """A model in evaluation mode from a published checkpoint of HQLT, Transformer++ or DeltaNet.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors``, its shards or ``pytorch_model.bin``, or a file of
            weights (``.safetensors``, ``.bin``, ``.pt``).
        config: the configuration, or its JSON file; by default ``config.json`` in the folder or beside the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a truncated or damaged file, or as :func:`hqlt.model_from_reference`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    folder = path if path.is_dir() else path.parent
    try:
        values = config if isinstance(config, Mapping) else read_json(Path(config) if config else folder / CONFIG)
        if not isinstance(values, Mapping):
            raise ValueError(f"the configuration of {path} is {type(values).__name__}, not an object")
        weights = _folder(folder) if path.is_dir() else _file(path)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"the checkpoint at {path} is damaged: {error}") from error
    try:
        return model_from_reference(values, weights).eval()
    except TypeError as error:
        raise ValueError(f"the checkpoint at {path} cannot be read: {error}") from error


def _folder(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        return read_weights(folder)
    index = folder / f"{PICKLED}.index.json"
    weights: dict[str, Tensor] = {}
    for shard in read_index(index) if index.is_file() else [PICKLED]:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {shard}; pass the folder of a model")
        weights.update(_file(folder / shard))
    return weights


def _file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated or foreign file makes torch.load raise nearly anything
        raise ValueError(f"the checkpoint at {path} is damaged: {error}") from error
    # Training scripts wrap the state dict.
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}, not a state dict")
    return dict(content)


def save_published(model: LanguageModel, directory: Path | str) -> None:
    """Write a model in its published format; each file is whole or absent.

    Raises:
        ValueError: the published code cannot express the model.
    """
    directory = Path(directory)
    config, weights = model_to_reference(model)
    tensors = {name: x.detach().contiguous() for name, x in weights.items()}
    write_tensors(directory / WEIGHTS, tensors, {"format": "pt"})
    (directory / INDEX).unlink(missing_ok=True)
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def convert(source: Path | str, target: Path | str, config: Path | str | None = None) -> str:
    """Convert a checkpoint to the other format: a published one to ours, ours to the published one.

    The target appears when it is complete; a ``tokenizer.json`` beside the weights comes along.

    Returns:
        what was done, in a sentence.

    Raises:
        FileExistsError: the target is the source, or a folder that is not empty.
        FileNotFoundError, ValueError: as :func:`load_published`, :func:`hqlt.load_model` and :func:`save_published`.
    """
    source, target = Path(source), Path(target)
    with new_folder(target) as folder:
        if source.is_dir() and config is None and _is_ours(source):
            model = load_model(source)
            save_published(model, folder)
            kind = f" in the published format of {read_json(folder / CONFIG)['model_type']}"
        else:
            model, kind = load_published(source, config), ""
            save_model(model, folder)
        tokenizer = (source if source.is_dir() else source.parent) / TOKENIZER
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / TOKENIZER)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters written{kind} to {target}"


def _is_ours(folder: Path) -> bool:
    try:
        values = read_json(folder / CONFIG)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(values, dict) and values.get("model_type", "hqlt") == "hqlt" and "memory" in values
