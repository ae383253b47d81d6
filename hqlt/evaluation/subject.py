"""What is evaluated: a model with its tokenizer, from a folder of a model or of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hqlt.models.files import CONFIG, fingerprint, load_model
from hqlt.models.language_model import LanguageModel
from hqlt.models.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from hqlt.training.claim import RECIPE
from hqlt.training.export import is_run, newest_model
from hqlt.training.pretraining import MODEL

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode.

    Attributes:
        folder: with its ``tokenizer.json``, if it has one.
        fingerprint: of the weights as they are stored.
        trained_length: tokens of a row in training, where the folder is, or lies in, that of a run.
    """

    model: LanguageModel
    folder: Path
    fingerprint: str
    trained_length: int | None

    @classmethod
    def load(cls, folder: Path, dtype: str = "float32", device: str | None = None) -> Subject:
        """The model of a folder; of a run the finished one, or that of its newest checkpoint.

        Args:
            folder: of a model or of a run.
            dtype: that the weights are converted to: float64, float32 or bfloat16.
            device: where it computes; None: a GPU if there is one.

        Raises:
            FileNotFoundError: no model there.
            ValueError: files that are damaged, or another dtype.
            RuntimeError: a device that is none.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        if is_run(folder) and not (folder / MODEL / CONFIG).is_file():
            model, _ = newest_model(folder)
            model.eval()
            run = folder
        else:
            run = folder if is_run(folder) else folder.resolve().parent
            folder = folder / MODEL if is_run(folder) else folder
            model = load_model(folder)
        identity = fingerprint(model)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.to(place, DTYPES[dtype]), folder, identity, _trained_length(run))

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model.

        Raises:
            FileNotFoundError: it has none.
        """
        return load_tokenizer(self.folder, self.model.config.vocab_size)

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the tokenizer's file; nothing where the model reads bytes or tokens."""
        path = self.folder / TOKENIZER
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    @property
    def window(self) -> int | None:
        """The largest window of a KV memory; None where there is none, or one without a bound."""
        windows = [memory.window for memory in self.model.config.memories if memory.kv_memory]
        return None if None in windows else max((w for w in windows if w is not None), default=None)


def _trained_length(run: Path) -> int | None:
    if not is_run(run):
        return None
    length = json.loads((run / RECIPE).read_text(encoding="utf-8"))["recipe"].get("length")
    return length if isinstance(length, int) else None
