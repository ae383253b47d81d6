"""Which ids a text becomes: bytes, a byte-level BPE trained on the texts, or a tokenizer that is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqlt.data.manifest import MANIFEST, Manifest, dtype_of
from hqlt.models.tokenizer import BYTES, TOKENIZER, FileTokenizer

BPE = "bpe:"
DOCUMENT = "<|endoftext|>"  # begins every document of a BPE trained here
NONE = "none"


@dataclass(frozen=True)
class Vocabulary:
    """A choice of tokenizer.

    Attributes:
        file: content of its ``tokenizer.json``, which also puts what begins a document before a text; None for bytes,
            and for a BPE that has yet to be trained.
        start: bytes that begin every document; empty where a file says it.
        train: ids of a BPE to train, or None.
    """

    file: str | None = None
    start: tuple[int, ...] = ()
    train: int | None = None

    @property
    def name(self) -> str:
        """What the manifest says about it: equal names make equal ids of equal texts."""
        if self.train is not None:
            return f"{BPE}{self.train}"
        return "bytes" if self.file is None else f"sha256:{hashlib.sha256(self.file.encode()).hexdigest()}"


def choose_vocabulary(wanted: str, start: str | None) -> Vocabulary:
    """The tokenizer that a command names.

    Args:
        wanted: ``bytes``; ``bpe:N``; a ``tokenizer.json``; a folder that holds one; a folder of prepared tokens; or a
            name or folder that transformers knows.
        start: what begins a document: the name of a token, or for bytes their values (``10,0,10``); ``none`` is
            nothing. By default what the tokenizer itself puts before a text; byte 0 for bytes.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a library is missing.
        ValueError: a name that is no tokenizer, or a start that it does not have.
    """
    path = Path(wanted)
    if wanted == "bytes":
        return Vocabulary(start=_bytes(start))
    if wanted.startswith(BPE):
        return Vocabulary(train=_bpe_size(wanted, start))
    if (path / MANIFEST).is_file():
        return _prepared(path, start)
    path = path / TOKENIZER if (path / TOKENIZER).is_file() else path
    if not path.is_file() and path.suffix == ".json":
        raise FileNotFoundError(f"there is no tokenizer {wanted}; give a {TOKENIZER}, bytes or {BPE}4096")
    return Vocabulary(file=_with_start(_library(path) if path.is_file() else _hub(wanted), wanted, start))


def _bytes(start: str | None) -> tuple[int, ...]:
    if start is None or start == NONE:
        return (0,) if start is None else ()
    values = tuple(int(part) if part.strip().isdecimal() else BYTES for part in start.split(","))
    if max(values) >= BYTES:
        raise ValueError(f"start={start!r} must be values of bytes such as 0 or 10,0,10, or {NONE}")
    return values


def _bpe_size(wanted: str, start: str | None) -> int:
    if start is not None:
        raise ValueError(f"start={start!r} has no effect: {DOCUMENT} begins a document of {wanted}; leave it out")
    size = wanted.removeprefix(BPE)
    if not size.isdecimal() or not BYTES < int(size) <= 1 << 20:
        raise ValueError(f"tokenizer={wanted!r} must be {BPE}N with N from {BYTES + 1} to {1 << 20}, such as {BPE}4096")
    return int(size)


def _prepared(directory: Path, start: str | None) -> Vocabulary:
    """The tokenizer of other tokens, such as the training data's for held-out data."""
    if start is not None:
        raise ValueError(f"start={start!r} contradicts tokenizer={str(directory)!r}, whose own start is kept; drop it")
    manifest = Manifest.read(directory)
    if manifest.tokenizer is None:
        return Vocabulary(start=tuple(manifest.start))
    return Vocabulary(file=(directory / TOKENIZER).read_text(encoding="utf-8"))


def _library(path: Path) -> Any:
    return FileTokenizer(path)._library  # its errors name the file


def _hub(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ImportError(f"the tokenizer {name} needs transformers: pip install 'hqlt[transformers]'") from error
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"tokenizer={name!r} is no file, and transformers cannot load it: {error}") from error
    library = getattr(loaded, "backend_tokenizer", None)
    if library is None:
        raise ValueError(f"the tokenizer {name} has no {TOKENIZER}; convert it to the tokenizers library first")
    return library


def _with_start(library: Any, name: str, start: str | None) -> str:
    """The file of a tokenizer that puts ``start`` before a text, and never cuts or pads one."""
    from tokenizers.processors import TemplateProcessing

    library.no_truncation()
    library.no_padding()
    if start is not None:
        token = None if start == NONE else library.token_to_id(start)
        if token is None and start != NONE:
            raise ValueError(f"start={start!r} is no token of {name}; choose {_choices(library)}")
        library.post_processor = TemplateProcessing(
            single="$A" if token is None else [start, "$A"], special_tokens=[] if token is None else [(start, token)]
        )
    elif _starts_bare(library):
        raise ValueError(
            f"{name} puts nothing before a text to part it from the last; set start to {_choices(library)}"
        )
    return str(library.to_str(pretty=True))


def _starts_bare(library: Any) -> bool:
    plain = library.encode("a", add_special_tokens=False).ids
    return bool(library.encode("a").ids[: len(plain)] == plain)


def _choices(library: Any) -> str:
    special = [token.content for _, token in sorted(library.get_added_tokens_decoder().items()) if token.special]
    return ", ".join([*special[:8], NONE])


def train_bpe(texts: Iterator[str], size: int) -> str:
    """The file of a byte-level BPE: any text can be encoded, and decoding gives it back.

    Words are split as in GPT-2; ``<|endoftext|>``, id 0, begins a document. The same texts make the same file.

    Raises:
        ImportError: the library is missing.
        ValueError: the texts have too few different words for so many ids.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from tokenizers.processors import TemplateProcessing
    except ModuleNotFoundError as error:
        raise ImportError("a BPE needs the tokenizers library: pip install 'hqlt[train]'") from error
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < size:
        raise ValueError(
            f"the texts have words for {library.get_vocab_size()} ids only; "
            f"choose {BPE}{library.get_vocab_size()} or add texts"
        )
    library.post_processor = TemplateProcessing(single=[DOCUMENT, "$A"], special_tokens=[(DOCUMENT, 0)])
    return str(library.to_str(pretty=True))


class Encoder:
    """Texts to ids as they are written.

    Attributes:
        start: ids that begin every document.
        vocab_size: every id is below it.
        dtype: of the ids.
    """

    def __init__(self, path: Path | None, start: tuple[int, ...] = ()) -> None:
        """From a ``tokenizer.json``, or for bytes that begin documents with ``start``."""
        self._library: Any = None
        self.start, self.vocab_size = list(start), BYTES
        if path is not None:
            tokenizer = FileTokenizer(path)
            self._library = tokenizer._library
            self.start = tokenizer.start
            self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())
            # A tokenizer that puts a space before a text puts none before what goes on after the end of a line.
            self._seam = self._ids("\n")
        self.dtype = dtype_of(self.vocab_size)

    def encode(self, text: str, begins: bool) -> NDArray[Any]:
        """Ids of a document with its start, or of a piece that goes on; none of an empty document.

        Raises:
            ValueError: the tokenizer made an id outside its vocabulary.
        """
        if self._library is None:
            content = np.frombuffer(text.encode(), self.dtype)
            return np.concatenate([np.array(self.start, self.dtype), content]) if begins and text else content
        ids = self._ids(text) if begins else self._continued(text)
        found = np.array(self.start * bool(begins and ids) + ids, np.int64)
        if len(found) and found.max() >= self.vocab_size:
            raise ValueError(f"the tokenizer made id {found.max()} outside its vocabulary of {self.vocab_size}")
        return found.astype(self.dtype)

    def _ids(self, text: str) -> list[int]:
        return list(self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _continued(self, text: str) -> list[int]:
        ids = self._ids("\n" + text)
        return ids[len(self._seam) :] if ids[: len(self._seam)] == self._seam else self._ids(text)
