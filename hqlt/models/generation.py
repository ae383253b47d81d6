"""Sampling from a language model, one token at a time, in memory that depends on the windows only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder
from hqlt.models.language_model import LanguageModel

# Tokens of a prompt that are read at a time.
READ_TOKENS = 4096


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
    check_sampling(temperature, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    Continuation(model, state, decoder)  # refuses here what it would refuse at the first token
    return _generate(model, prompt, max_new_tokens, temperature, top_p, seed, state, decoder)


def check_sampling(temperature: float, top_p: float) -> None:
    """A temperature is finite and not negative, top_p lies in (0, 1]."""
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be finite and at least 0, and top_p={top_p} in (0, 1]")


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
    text = Continuation(model, state, decoder)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    if max_new_tokens:
        text.read(prompt)
    yield from text.sample(max_new_tokens, temperature=temperature, top_p=top_p, generator=generator)


class Continuation:
    """A text that is read and continued, in turns; its state is a value that can be kept, saved or gone back to."""

    def __init__(self, model: LanguageModel, state: ModelState | None = None, decoder: Decoder | None = None) -> None:
        """Go on from a state of one text, or start.

        Args:
            model: in evaluation mode.
            state: of the text so far.
            decoder: of this model, for single tokens. It serves one text at a time.

        Raises:
            ValueError: a decoder of another model, or one whose model is in training mode.
        """
        if decoder is not None and decoder.model is not model:
            raise ValueError("the decoder belongs to another model; make one of this model")
        if decoder is not None and model.training:
            raise ValueError("the model is in training mode; call model.eval() before decoding")
        self.model = model
        self._state, self._decoder = state, decoder
        self._load: int | None = None
        self._logits: Tensor | None = None
        self._unread: Tensor | None = None

    @property
    def state(self) -> ModelState | None:
        """After all that was read or sampled; None before the first token.

        Raises:
            RuntimeError: the decoder was given to another text meanwhile.
        """
        if self._unread is not None:
            self._step()
        return self._current()

    def _current(self) -> ModelState | None:
        if self._load is None:
            return self._state
        assert self._decoder is not None
        if self._decoder.loads != self._load:
            raise RuntimeError("the decoder was given to another text meanwhile; use one decoder for each")
        return self._decoder.state

    @torch.no_grad()
    def read(self, tokens: Tensor) -> None:
        """Read token ids [T], in pieces, so that memory does not grow with their number."""
        if self._unread is not None:
            tokens = torch.cat([self._unread, tokens])
        state = self._current()
        for piece in tokens.split(READ_TOKENS):
            hidden, state = self.model.hidden_states(piece[None], state)
            self._logits = self.model.head(hidden[0, -1])
        self._state, self._load, self._unread = state, None, None

    @torch.no_grad()
    def _step(self) -> None:
        assert self._unread is not None
        if self._decoder is None or self._state is None:
            self.read(self._unread.new_empty(0))
            return
        if self._load is None:
            self._decoder.load(self._state)
            self._load = self._decoder.loads
        elif self._decoder.loads != self._load:
            raise RuntimeError("the decoder was given to another text meanwhile; use one decoder for each")
        self._logits, self._unread = self._decoder(self._unread)[0], None

    def sample(
        self, count: int, *, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
    ) -> Iterator[int]:
        """Yield up to ``count`` sampled token ids, which become part of the text.

        Args:
            count: the most to yield; stop earlier as you like.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: sample from the smallest set of tokens with at least this probability, in (0, 1].
            generator: of the sampling.

        Raises:
            RuntimeError: nothing was read yet, or the decoder was given to another text meanwhile.
        """
        for _ in range(count):
            if self._unread is not None:
                self._step()
            if self._logits is None:
                raise RuntimeError("read a prompt before sampling")
            self._unread = _sample(self._logits, temperature, top_p, generator).view(1)
            yield int(self._unread)


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token id from logits [V]."""
    if temperature == 0:
        return logits.argmax()
    probability, order = ((logits.double() - logits.max()) / temperature).softmax(-1).sort(descending=True)
    # A token stays if the more likely ones have not reached top_p yet; the first always does.
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    return order[torch.multinomial(probability, 1, generator=generator)]
