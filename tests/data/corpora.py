"""Small texts in all formats, and folders of prepared tokens to compare."""

import gzip
import json
import random
from pathlib import Path

import numpy as np

from hqlt.data import TokenShards
from hqlt.data.prepare import Preparation, prepare

ALPHABET = "abcdefgh ijklmno pqrst\n\r\tÄß€∀字🙂"


def documents(count: int = 40, longest: int = 120, seed: int = 0) -> list[str]:
    """Texts that are all different, in Latin letters and others, with line ends of all kinds."""
    generator = random.Random(seed)
    return [f"{n} " + "".join(generator.choices(ALPHABET, k=generator.randint(0, longest))) for n in range(count)]


def write_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for n, text in enumerate(texts):
        (folder / f"{n:04}.txt").write_bytes(text.encode())
    return folder


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    content = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: list[str], field: str = "text", group: int = 7) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def prepared(source: Path | list[Path], output: Path, workers: int = 1, **options: object) -> Path:
    """Tokens of a source; bytes unless told otherwise."""
    sources = source if isinstance(source, list) else [source]
    wanted = {"tokenizer": "bytes", **options}
    prepare(Preparation(sources=tuple(str(path) for path in sources), **wanted), output, workers)
    return output


def shards_of(texts: list[str], folder: Path, unit_bytes: int = 700) -> TokenShards:
    """Texts as bytes, in several shards."""
    source = write_jsonl(folder / "texts.jsonl", texts)
    return TokenShards.open(prepared(source, folder / "tokens", unit_bytes=unit_bytes))


def concatenation(texts: list[str]) -> np.ndarray:
    """The tokens of texts as bytes, made in another way: byte 0 before each."""
    return np.frombuffer(b"".join(b"\0" + text.encode() for text in texts), np.uint8).astype(np.int64)


def borders(texts: list[str]) -> list[int]:
    """Where the documents of the concatenation begin."""
    return np.cumsum([0] + [1 + len(text.encode()) for text in texts])[:-1].tolist()


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens(folder: Path) -> tuple[list[int], list[int]]:
    """All ids, and where documents begin."""
    shards = TokenShards.open(folder)
    return shards.read(0, shards.num_tokens).tolist(), shards.document_starts(0, shards.num_tokens).tolist()
