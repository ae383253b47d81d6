"""FDA with the published cropping of its documents, which the harness's own task does not have."""

from __future__ import annotations

from typing import Any

from lm_eval.tasks.fda.task import FDA

from hqlt.models.tokenizer import Tokenizer

CONTEXT, ANSWER = 1000, 50  # tokens: of a prompt, and of these kept free for the answer


def fda_prompt(text: str, key: str, value: str, tokenizer: Tokenizer, position: int | None = None) -> str:
    """The published prompt: 950 tokens of a document around the answer, then the key.

    The tokens lie around the first occurrence of key or value, whichever comes first, in any case; where neither occurs
    they end with the document, so that half as many are left. What the text ends with — key, line breaks, dots — is
    removed, and ". Key:" added.

    Args:
        position: of the middle in tokens, where the data say it.

    Source: based_fda of the prefix-linear-attention evaluation (context_length 1000, answer_length 50).
    """
    text = text.strip()
    ids = tokenizer.encode(text)
    if position is None:
        places = [place for word in (key, value) if (place := text.lower().find(word.strip().lower())) >= 0]
        position = len(tokenizer.encode(text[: min(places)])) if places else len(ids)
    half = (CONTEXT - ANSWER) // 2
    decode = tokenizer.stream([])
    cropped = "".join(decode(token) for token in ids[max(0, position - half) : position + half])
    before = None
    while cropped != before:
        before = cropped
        cropped = cropped.rstrip("\n. ")
        if key and cropped.lower().endswith(key.lower()):
            cropped = cropped[: -len(key)]
    return f"{cropped}. {key[:1].upper()}{key[1:]}:"


class PublishedFDA(FDA):
    """The harness's task with the published prompts; items whose key or value has one character are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        super().__init__()

    def validation_docs(self) -> Any:
        """Items that are asked."""
        return self.dataset["validation"].filter(
            lambda doc: len(doc["key"].strip()) > 1 and len(doc["value"].strip()) > 1, load_from_cache_file=False
        )

    def doc_to_text(self, doc: dict[str, Any], *_: Any) -> str:
        """The prompt."""
        value = self.doc_to_target(doc)
        return fda_prompt(doc["text"], doc["key"].strip(), value, self._tokenizer, doc.get("tok_pos"))
