"""Divides documents of keys and values: texts to train and to validate on, and documents to ask about afterwards.

A text is a piece of a document with questions about it and their answers, or a made-up list of facts that are asked for
time and again: lists teach to look up, documents what there is to look up. No document of the test is in any text.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from hqlt.evaluation.factbook import divided, drill, find_documents, practice, read_documents, vocabulary
from hqlt.files import write_jsonl


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "documents",
        type=Path,
        help='JSON lines {"name": …, "fields": [[key, value], …]}, or a folder with factbook*.jsonl',
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--texts", type=int, default=60, help="of every document (default: 60)")
    parser.add_argument("--longest", type=int, default=6000, help="characters of a piece (default: 6000)")
    parser.add_argument("--questions", type=int, default=32, help="at most in a text (default: 32)")
    parser.add_argument(
        "--lists", type=float, default=0.5, metavar="SHARE", help="of all characters, in made-up lists (default: 0.5)"
    )
    parser.add_argument("--longest-list", type=int, default=3000, help="characters of a list (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    if not 0 <= options.lists < 1:
        parser.error(f"--lists {options.lists} must be at least 0 and less than 1")
    try:
        documents = read_documents(find_documents(options.documents))
        train, validation, test = divided(documents, options.seed, (0.05, 0.2))
        for name, part in (("train", train), ("validation", validation)):
            generator = random.Random(f"{options.seed} {name}")
            drawn = generator.sample(part * options.texts, len(part) * options.texts)
            texts = [practice(document, generator, options.longest, options.questions) for document in drawn]
            room = sum(map(len, texts)) * options.lists / (1 - options.lists)
            words = vocabulary(part)
            while room > 0:
                texts.append(drill(words, generator, options.longest_list))
                room -= len(texts[-1])
            generator.shuffle(texts)
            write_jsonl(options.output / f"{name}.jsonl", [{"text": text} for text in texts])
        rows = [{"name": document.name, "fields": document.fields} for document in test]
        write_jsonl(options.output / "test.jsonl", rows)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    counts = f"{len(train)} documents to train, {len(validation)} to validate, {len(test)} to test"
    print(f"{counts} in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
