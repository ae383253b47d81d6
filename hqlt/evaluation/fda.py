"""FDA with the published cropping of its documents, which the harness's own task does not have."""

from __future__ import annotations

from typing import Any

from lm_eval.tasks.fda.task import FDA

from hqlt.models.tokenizer import Tokenizer

CONTEXT, ANSWER = 1000, 50  # tokens: of a prompt, and of these kept free for the answer


def fda_prompt(text: str, key: str, value: str, tokenizer: Tokenizer, position: int | None = None) -> str:
    """The published prompt: 950 tokens of a document around the answer, then the key.

    The middle is the first occurrence of key or value, whichever comes first, in any case: 475 tokens before it, or as
    many as there are, and what is left of the 950 after it. Where neither occurs it is the end of the document. What
    the crop ends with — "key:", line breaks, dots — is removed, and ". Key:" added.

    Args:
        position: of the middle, in tokens, for a long document in which neither occurs.

    Source: based_fda of the prefix-linear-attention evaluation (context_length 1000, answer_length 50).
    """
    text = text.strip()
    ids = tokenizer.encode(text)
    places = [place for word in (key, value) if (place := text.lower().find(word.lower())) >= 0]
    middle = len(tokenizer.encode(text[: min(places)] if places else text))
    if not places and position is not None and len(ids) > CONTEXT - ANSWER:
        middle = position
    start = max(0, middle - (CONTEXT - ANSWER) // 2)
    decode = tokenizer.stream(ids[max(0, start - 8) : start])
    cropped = "".join(decode(token) for token in ids[start : start + CONTEXT - ANSWER])
    while cropped.lower().endswith(f"{key}:".lower()):
        cropped = cropped[: -len(key) - 1]
    cropped = cropped.strip("\n").strip(".")
    return f"{cropped}. {key[0].upper()}{key[1:]}:"


class PublishedFDA(FDA):
    """The harness's task with the published prompts; items whose key or value has one character are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        super().__init__()

    def validation_docs(self) -> Any:
        """Items that are asked."""
        rows = self.dataset["validation"]
        return rows.select([n for n, row in enumerate(rows) if len(row["key"]) > 1 and len(row["value"]) > 1])

    def doc_to_text(self, doc: dict[str, Any], *_: Any) -> str:
        """The prompt."""
        return fda_prompt(doc["text"], doc["key"], doc["value"], self._tokenizer, doc.get("tok_pos"))
