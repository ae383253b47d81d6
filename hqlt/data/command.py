"""`hqlt data prepare` and `hqlt data check`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hqlt.data.manifest import Manifest


def add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its two commands."""
    data = commands.add_parser("data", help="turn texts into tokens to train on", description="Texts as tokens.")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    _add_prepare(actions)
    check = actions.add_parser(
        "check",
        help="verify prepared tokens",
        description="Compare sizes and checksums of all files with the manifest, name each that differs, print totals.",
    )
    check.add_argument("directory", type=Path, help="folder that hqlt data prepare has written")
    check.set_defaults(run=_check)


def _add_prepare(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prepare = actions.add_parser(
        "prepare",
        help="write texts as packed tokens",
        description="Write the tokens of texts and where documents begin to a folder. Interrupt, kill and repeat at "
        "will: finished shards are kept, and the folder becomes the same byte for byte, whatever the number of "
        "workers. A shard comes from 4 to 256 MiB of files, or from a whole compressed file or data file of a data "
        "set, which is read again if it was not finished.",
    )
    prepare.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a text file (one document); .jsonl, .jsonl.gz, .jsonl.zst or .parquet with a field that holds the text; "
        "a folder of .txt and such files; or hf:NAME[@REVISION][:CONFIG[:SPLIT]], a data set of the hub or in a folder",
    )
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder, or one to go on with")
    prepare.add_argument(
        "--tokenizer",
        required=True,
        metavar="T",
        help="bytes; bpe:N, a byte-level BPE of N ids trained on the texts; a tokenizer.json or a folder with one; a "
        "folder of prepared tokens; or a name that transformers knows",
    )
    prepare.add_argument(
        "--start",
        metavar="TOKEN",
        help="what begins a document: the name of a token, for bytes their values such as 10,0,10, or none (default: "
        "what the tokenizer puts before a text; byte 0 for bytes). Nothing ends a document",
    )
    prepare.add_argument("--workers", type=int, help="processes (default: one per core)")
    prepare.add_argument("--text-field", metavar="NAME", help="field or column that holds the text (default: text)")
    prepare.add_argument("--limit-tokens", type=int, metavar="N", help="end with the document that reaches N tokens")
    prepare.add_argument(
        "--invalid-utf8",
        choices=("error", "replace"),
        default="error",
        help="replace: by U+FFFD (default: %(default)s, which names the place)",
    )
    prepare.add_argument("--unit-bytes", type=int, metavar="N", help="bytes of the files that make a shard, about")
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from hqlt.data.prepare import Preparation, prepare

    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers} must be at least 1")
    wanted = Preparation(
        sources=tuple(options.sources),
        tokenizer=options.tokenizer,
        start=options.start,
        text_field=options.text_field,
        limit_tokens=options.limit_tokens,
        replace_invalid=options.invalid_utf8 == "replace",
        unit_bytes=options.unit_bytes,
    )
    manifest = prepare(wanted, options.output, options.workers)
    print(_totals(options.output, manifest))
    return 0


def _check(options: argparse.Namespace) -> int:
    from hqlt.data.check import check

    print(_totals(options.directory, check(options.directory)))
    return 0


def _totals(directory: Path, manifest: Manifest) -> str:
    tokens, documents, empty, size = (manifest.total(name) for name in ("tokens", "documents", "empty", "bytes"))
    left_out = f" ({empty:,} empty ones left out)" if empty else ""
    return (
        f"{directory}: {tokens:,} tokens of {documents:,} documents{left_out} in {len(manifest.shards):,} shards; "
        f"{size:,} bytes of text, {size / tokens:.3f} per token; vocabulary {manifest.vocab_size:,}"
    )
