"""The cache of transformers: a mutable holder of a :class:`hqlt.ModelState`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from hqlt.layers.state import ModelState
from hqlt.models.decoding import Decoder

# Tokens before the crop that a draft model may still ask back.
KEPT_AFTER_CROP = 16


class HQLTCache(Cache):
    """What a model carries from one call of transformers to the next: both memories of every layer.

    The state itself is a value: ``HQLTCache(cache.state, cache.get_seq_length())`` forks a text, whatever happens to
    either branch later.
    """

    def __init__(
        self, state: ModelState | None = None, tokens: int | None = None, decoder: Decoder | None = None
    ) -> None:
        """Start empty or from a state.

        Args:
            state: of documents that are continued.
            tokens: columns that the documents took in the batch, pads included; by default the longest position.
            decoder: of the model that will be called: single tokens then go through its compiled step.
        """
        if state is not None and not isinstance(state, ModelState):
            raise TypeError(f"state must be a ModelState, not {type(state).__name__}")
        super().__init__(layers=[])
        self._state = state
        self._tokens = tokens if tokens is not None else 0 if state is None else int(state.position.max())
        self._decoder = decoder
        self._load: int | None = None
        # Columns since the last call that had pads; None: none had.
        self._unpadded: int | None = None
        self._recording = state is not None and state.num_tracked is not None

    @property
    def state(self) -> ModelState | None:
        """Both memories of every layer; None while the cache is empty."""
        return self._state if self._load is None else self._live_decoder().state

    def advance(self, state: ModelState, tokens: int, padded: bool = False) -> None:
        """Take the state after this many more columns, some of which may have been pads."""
        self._state, self._load = state, None
        self._tokens += tokens
        if padded:
            self._unpadded = 0
        elif self._unpadded is not None:
            self._unpadded += tokens

    @property
    def position(self) -> Tensor:
        """Tokens read of each document, int64 [B] on the host."""
        if self._load is not None:
            return self._live_decoder().position
        assert self._state is not None
        return self._state.position

    @property
    def decoder(self) -> Decoder | None:
        """That single tokens go through."""
        return self._decoder

    def step(self, input_ids: Tensor) -> Tensor | None:
        """Logits [B, V] after one token per document from the decoder, or None where it cannot be used."""
        if self._decoder is None or self._recording or self._state is None:
            return None
        if self._load is None:
            self._decoder.load(self._state)
            self._load = self._decoder.loads
        logits = self._live_decoder()(input_ids)
        self._tokens += 1
        if self._unpadded is not None:
            self._unpadded += 1
        return logits

    def _live_decoder(self) -> Decoder:
        assert self._decoder is not None
        if self._decoder.loads != self._load:
            raise RuntimeError("the decoder was given to another text meanwhile; use one decoder for each cache")
        return self._decoder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, pads included."""
        return self._tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: no bound."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask covers, and its offset."""
        return self._tokens + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self._state, self._load, self._tokens, self._unpadded = None, None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue these documents, in this order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Continue these documents, in this order; a document may be repeated."""
        state = self.state
        if state is not None:
            self._replace(state.select(indices.cpu()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue every document as many times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Remember later tokens, so that :meth:`crop` can take them back."""
        self._recording = True
        if self.state is not None and self.state.num_tracked is None:
            self._replace(self.state.track())

    def deactivate_past_recording(self) -> None:
        """Forget how to take tokens back."""
        self._recording = False
        if self.state is not None:
            self._replace(self.state.untracked())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last −n tokens of every document, and forget how to take back most of the others.

        Raises:
            ValueError: a positive number, or more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the negative number of tokens to take back")
        if self._unpadded is not None and -tokens_to_remove > self._unpadded:
            raise ValueError(
                f"crop({tokens_to_remove}): only the last {self._unpadded} columns are free of pads, and "
                "rows differ in tokens before them; crop the state by a number for each row"
            )
        if self.state is None:
            return
        if tokens_to_remove:
            self._replace(self.state.crop(-tokens_to_remove))
            self._tokens += tokens_to_remove
        if self._recording and self.state is not None:
            self._replace(self.state.cut(KEPT_AFTER_CROP))

    def _replace(self, state: ModelState) -> None:
        self._state, self._load = state, None

    @property
    def batch_size(self) -> int:
        """Documents, −1 while the cache is empty."""
        return -1 if self._state is None else len(self.position)

    @property
    def is_compileable(self) -> bool:
        """False: a :class:`hqlt.Decoder` compiles the step instead."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: the columns seen are left out of a prompt that repeats them."""
        return [False] * len(self)

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds a state."""
        return self._state is not None

    @property
    def is_croppable(self) -> bool:
        """Whether later tokens can be taken back."""
        return self._recording

    def __len__(self) -> int:
        return 0 if self._state is None else len(self._state.layers)

    def __repr__(self) -> str:
        size = 0 if self.state is None else self.state.num_bytes
        return f"HQLTCache({self._tokens} tokens, {size} bytes)"

    def __deepcopy__(self, memo: dict[int, Any]) -> HQLTCache:
        """A fork: states are values and need no copy. A decoder serves one text and stays with the original."""
        copy = HQLTCache(self.state, self._tokens)
        copy._recording, copy._unpadded = self._recording, self._unpadded
        return copy
