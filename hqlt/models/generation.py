"""Sampling from a language model, one token at a time, in memory that depends on the windows only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder
from hqlt.models.language_model import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    state: ModelState | None = None,
    decoder: Decoder | None = None,
) -> Iterator[int]:
    """Yield sampled token ids.

    Args:
        model: in evaluation mode.
        prompt: token ids [T], at least one.
        max_new_tokens: how many to yield.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability, in (0, 1].
        seed: of the sampling.
        state: of the text before the prompt.
        decoder: of this model, for the tokens after the prompt; compiled, it is several times faster per token. It
            serves one text at a time.

    Raises:
        ValueError: an empty prompt, a negative or infinite temperature, a negative count, top_p outside (0, 1], a
            decoder of another model, or one whose model is in training mode.
        RuntimeError: the decoder was given to another text meanwhile.
    """
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; expected [T] with at least one token")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be finite and at least 0, and top_p={top_p} in (0, 1]")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if decoder is not None and decoder.model is not model:
        raise ValueError("the decoder belongs to another model; make one of this model")
    if decoder is not None and model.training:
        raise ValueError("the model is in training mode; call model.eval() before decoding")
    return _generate(model, prompt, max_new_tokens, temperature, top_p, seed, state, decoder)


@torch.no_grad()
def _generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    state: ModelState | None,
    decoder: Decoder | None,
) -> Iterator[int]:
    generator = torch.Generator(prompt.device).manual_seed(seed)
    mine = 0
    for n in range(max_new_tokens):
        if n == 0 or decoder is None:
            logits, state = model(prompt[None], state)
        elif decoder.loads != mine:
            raise RuntimeError("the decoder was given to another text meanwhile; use one decoder for each")
        else:
            logits = decoder(prompt)[None]
        prompt = _sample(logits[0, -1], temperature, top_p, generator).view(1)
        yield int(prompt)
        if n == 0 and decoder is not None and state is not None:
            decoder.load(state)
            mine = decoder.loads


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id from logits [V]."""
    if temperature == 0:
        return logits.argmax()
    probability, order = ((logits.float() - logits.max()) / temperature).softmax(-1).sort(descending=True)
    # A token stays if the more likely ones have not reached top_p yet; the first always does.
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    return order[torch.multinomial(probability, 1, generator=generator)]
