"""A language model of this library behind the interface of lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hqlt.evaluation.reading import check_reading, log_likelihoods, written_texts
from hqlt.models.language_model import LanguageModel
from hqlt.models.modeling_hqlt import HQLTForCausalLM
from hqlt.models.tokenizer import TOKENIZER, Tokenizer


class HarnessModel(HFLM):
    """A model and its tokenizer for the harness: same limit of context for every kind of model, contexts read once.

    Nothing comes before a text, as in the published evaluation; a text without a context, and the first window of a
    rolling perplexity, follow what begins documents in training.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, folder: Path, *, batch_size: int, max_length: int
    ) -> None:
        """Wrap a model in evaluation mode.

        Args:
            model, tokenizer: what is evaluated.
            folder: of the model; its ``tokenizer.json``, if there is one, is what the harness reports.
            batch_size: contexts, or continuations, read at a time.
            max_length: the most tokens that the model reads, a continuation to be written included.
        """
        check_reading(batch_size, max_length)
        level = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warns that it was given a model
        try:
            super().__init__(
                pretrained=HQLTForCausalLM.of(model),
                backend="causal",
                tokenizer=_library(folder),
                batch_size=batch_size,
                max_length=max_length,
                add_bos_token=False,
                prefix_token_id=document_start(tokenizer),
            )
        finally:
            logging.getLogger("lm_eval").setLevel(level)
        self._plain, self._own = model, tokenizer

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Ids of a text, with nothing before it."""
        return self._own.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="log-likelihoods", leave=False) as bar:
            found = log_likelihoods(
                self._plain,
                [(context, continuation) for _, context, continuation in requests],
                batch_size=self.batch_size,
                max_length=self.max_length,
                done=bar.update,
            )
        return [(score.nats, score.greedy) for score in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop text, which is left out.

        A prompt loses its first tokens where it leaves less room than what may be written.

        Raises:
            ValueError: a task that samples, or that writes more than the context has room for.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for n, request in enumerate(requests):
            groups[_stops(request.args[1])].append(n)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="continuations", leave=False) as bar:
            for (count, stops), members in groups.items():
                prompts = [requests[n].args[0] for n in members]
                for n, text in zip(members, self._continued(prompts, count, stops, bar.update), strict=True):
                    texts[n] = text
        return texts

    def _continued(self, prompts: list[str], count: int, stops: tuple[str, ...], done: Any) -> list[str]:
        room = self.max_length - count
        if room < 1:
            raise ValueError(f"{count} new tokens leave no room for a prompt in max_length={self.max_length}")
        ids = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        return written_texts(self._plain, self._own, [([], x) for x in ids], count, stops, self.batch_size, done)


def document_start(tokenizer: Tokenizer) -> int:
    """The id before the first token of a document: what the tokenizer puts there; of bytes 0; else a line break."""
    if tokenizer.start:
        return tokenizer.start[-1]
    newline = tokenizer.encode("\n")
    return 0 if newline == [ord("\n")] else newline[-1]


def _stops(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """How many tokens a request may write, and the texts that end it."""
    if options.get("do_sample") or options.get("temperature"):
        raise ValueError(f"the task samples ({options}); only greedy continuations are evaluated")
    until = options.get("until") or []
    return int(options.get("max_gen_toks", 256)), tuple([until] if isinstance(until, str) else until)


def _library(folder: Path) -> PreTrainedTokenizerFast:
    """What the harness asks about a tokenizer; ids come from ours."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    if (folder / TOKENIZER).is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=Library(models.BPE({x: n for n, x in enumerate(alphabet)}, [])))
