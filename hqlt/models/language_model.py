"""Plain-torch models: a sequence model on embeddings, and the causal language model around it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqlt.config import ModelConfig
from hqlt.layers.block import Block, make_norm
from hqlt.layers.fixed import FixedSegments
from hqlt.layers.linear import Linear, ResidualLinear, StrengthLinear
from hqlt.layers.mixers import Mixer
from hqlt.layers.norm import make_dropout
from hqlt.layers.segments import Segments
from hqlt.layers.state import ModelState
from hqlt.layers.update_rules import GatedDeltaRule
from hqlt.models.streaming import StreamScore, Tokens, stream

IGNORE = -100
# Bytes of float32 logits that a loss makes at a time; more are computed again for their gradient instead of kept.
LOGITS_BYTES = 1 << 26


class SequenceModel(nn.Module):
    """Blocks and the final norm, from embeddings [B, T, D] to hidden states [B, T, D].

    Attributes:
        gradient_checkpointing: in training, keep the inputs of blocks only and compute the rest again for gradients.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"a model takes a ModelConfig, not {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Block(config, memory, mlp) for memory, mlp in config.blocks)
        self.norm = make_norm(config)
        self.dropout = make_dropout(config.dropout)
        if type(self) is SequenceModel:
            self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights: N(0, initializer_range), norms 1, biases 0, and the residual rescale if configured.

        Source: specification of the published models; a module owning an output or down projection re-draws it from
        U(±1/√fan_in) / √(2N).
        """
        for module in self.modules():
            self.init_module(module)
        for module in self.modules():
            self.rescale_module(module)

    def init_module(self, module: nn.Module) -> None:
        """Draw a module's own weights, submodules aside."""
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding)):
            nn.init.normal_(module.weight, std=self._initializer_range(module))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm, GatedDeltaRule, Mixer)):
            module.reset_parameters()

    def _initializer_range(self, module: nn.Module) -> float:
        config = self.config
        special = None
        if isinstance(module, nn.Conv1d):
            special = config.conv_initializer_range
        elif isinstance(module, StrengthLinear):
            special = config.beta_initializer_range
        return config.initializer_range if special is None else special

    def rescale_module(self, module: nn.Module) -> None:
        """Draw the weight of a projection onto the residual stream again, if so configured."""
        if self.config.rescale_residual and isinstance(module, ResidualLinear):
            bound = module.in_features**-0.5 / math.sqrt(2 * self.config.num_hidden_layers)
            nn.init.uniform_(module.weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Continue N documents by new tokens; arguments and errors as :meth:`hqlt.HybridMemory.forward`."""
        return self.encode(x, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)

    def encode(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """:meth:`SequenceModel.forward`; ``hidden_states`` is extended by what enters and leaves the blocks."""
        for block in self.blocks[:1]:
            block.memory.check_input(x)  # type: ignore[union-attr, operator]
        if state is not None and not isinstance(state, ModelState):
            raise TypeError(f"state must be a ModelState, not {type(state).__name__}")
        if state is not None:
            self._check_depth(state)
        past = None if state is None else state.position
        segments = Segments((x.shape[0], x.shape[1]), past, attention_mask, cu_seqlens, x.device)
        packed: list[Tensor] | None = None if hidden_states is None else []
        y, state = self.advance(segments.pack(x), state, segments, packed)
        if hidden_states is not None and packed is not None:
            hidden_states.extend(segments.unpack(h) for h in packed)
        return segments.unpack(y), state

    def use_backend(self, backend: str) -> None:
        """Compute all memories with another backend. ``config``, which is saved, keeps what it says: a model that was
        trained with kernels of a GPU is loaded anywhere.

        Raises:
            ValueError: there is no such backend.
        """
        for block in self.blocks:
            block.memory.use_backend(backend)  # type: ignore[union-attr, operator]

    def check_state(self, state: ModelState) -> None:
        """The state has the layers, parts and sizes of this model; calls of the model check it too."""
        self._check_depth(state)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            block.memory.check_state(layer)  # type: ignore[union-attr, operator]

    def _check_depth(self, state: ModelState) -> None:
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"the state has {len(state.layers)} layers but the model has {len(self.blocks)}")

    def empty_state(self, documents: int, like: Tensor | None = None) -> ModelState:
        """The state of N documents before their first token: what a state of None means.

        Args:
            documents: N.
            like: whose dtype and device it takes; None: those of the weights.
        """
        like = self.norm.weight if like is None else like
        return ModelState(tuple(block.memory.empty_state(documents, like) for block in self.blocks))  # type: ignore[union-attr, operator]

    def advance(
        self,
        x: Tensor,
        state: ModelState | None,
        segments: Segments | FixedSegments,
        hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """:meth:`encode` on tokens that ``segments`` has packed."""
        # Dropout before the positions are added, as in the published models.
        x = self.dropout(x)
        if self.config.position_embedding == "sinusoidal":
            x = x + sinusoidal(segments.token_positions(), self.config.hidden_size).to(x.dtype)
        layers = []
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for n, block in enumerate(self.blocks):
            if hidden_states is not None:
                hidden_states.append(x)
            arguments = (x, None if state is None else state.layers[n], segments)
            x, layer = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            layers.append(layer)
        if hidden_states is not None:
            hidden_states.append(x)
        return self.norm(x), ModelState(tuple(layers))


class LanguageModel(SequenceModel):
    """Embedding, blocks, final norm and head: a causal language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def set_embedding(self, embedding: nn.Embedding) -> None:
        """Replace the embedding; the vocabulary becomes as large as it is, and a tied head follows."""
        self.embedding = embedding
        self.config = replace(self.config, vocab_size=embedding.num_embeddings)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter if so configured; loading by assignment parts them."""
        if self.config.tie_embeddings and isinstance(self.head, nn.Linear):
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits of the next token.

        Args:
            input_ids: integer tensor [B, T], ids in 0 … vocab_size − 1.
            state, attention_mask, cu_seqlens: as :meth:`hqlt.HybridMemory.forward`.

        Returns:
            logits [B, T, vocab_size] and the state after the last token. At a pad the logits mean nothing.

        Raises:
            TypeError, ValueError: input_ids that are not integers, not [B, T] or outside the vocabulary, and as
                :meth:`hqlt.HybridMemory.forward`.
        """
        hidden, state = self.hidden_states(input_ids, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        return self.head(hidden), state

    def hidden_states(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Hidden states [B, T, D] after the final norm, and the state; arguments as :meth:`forward`."""
        self.check_ids(input_ids)
        return self.encode(self.embedding(input_ids), state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: ModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Mean next-token cross-entropy in nats.

        Args:
            labels: [B, T], by default ``input_ids``; shifted here, so labels[t + 1] is the target of token t. −100 is
                ignored, and so are pads and the first token of a packed document.
            input_ids, state, attention_mask, cu_seqlens: as :meth:`forward`.

        Returns:
            a float32 scalar and the state after the last token.
        """
        hidden, state = self.hidden_states(input_ids, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens)
        labels = input_ids if labels is None else labels
        return self.target_loss(hidden, shifted(labels, hidden.shape[:2], attention_mask, cu_seqlens)), state

    def target_loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        count: Tensor | int | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of hidden states [B, T, D] against unshifted targets [B, T], −100 ignored: mean, or Σ / count.

        Only positions with a target reach the head: a task that supervises one token per row pays for one. The logits
        of many positions are made in pieces, and again for their gradient. With label smoothing s a target is
        (1 − s)·one-hot + s / vocab_size.
        """
        used = targets != IGNORE
        if not bool(used.any()):
            if count is not None:  # a part of a larger batch
                nothing = hidden.sum() + self.head(hidden[:1, :1]).sum()  # every parameter has a gradient
                loss: Tensor = 0 * nothing.to(torch.promote_types(hidden.dtype, torch.float32)) / count
                return loss
            raise ValueError("no token has a target: pass two tokens of one document at least, or targets besides -100")
        hidden, targets = hidden[used], targets[used]
        self._check_range("target", targets)
        rows = max(1, LOGITS_BYTES // (4 * self.config.vocab_size))
        pieces = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if len(pieces) == 1 or not torch.is_grad_enabled():
            sums = [self._summed_loss(h, t, label_smoothing) for h, t in pieces]
        else:
            sums = [
                cast(Any, checkpoint(self._summed_loss, h, t, label_smoothing, use_reentrant=False)) for h, t in pieces
            ]
        total: Tensor = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        return total / (len(targets) if count is None else count)

    def _summed_loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        logits = self.head(hidden)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, reduction="sum", label_smoothing=smoothing)

    def stream(
        self, tokens: Tokens, *, chunk_size: int = 4096, start: StreamScore | None = None
    ) -> Iterator[StreamScore]:
        """Score a stream of any length in constant memory (where every KV memory has a window).

        Args:
            tokens: ids of one text, one by one or in lists, 1-D tensors or bytes.
            chunk_size: tokens that the model reads at a time; changes a result by rounding only.
            start: the score to go on from: the stream then begins after the ``start.read`` tokens that it has read.

        Yields:
            the score so far, after every chunk.

        Raises:
            TypeError, ValueError: tokens that are no ids of the vocabulary, a chunk size below 1, training mode.
        """
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size!r} must be an int of at least 1")
        if self.training:
            raise ValueError("the model is in training mode; call model.eval() before scoring")
        return stream(self, tokens, chunk_size, start)

    def check_ids(self, input_ids: Tensor) -> None:
        """Integer ids [B, T] of the vocabulary."""
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids must be an int32 or int64 tensor, not {kind}")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected [B, T]")
        self._check_range("token id", input_ids)

    def _check_range(self, what: str, ids: Tensor) -> None:
        """Ids lie in the vocabulary; checked where looking costs no wait for a device."""
        if ids.numel() and ids.device.type == "cpu":
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"{what} {bad} is outside the vocabulary 0 … {self.config.vocab_size - 1}")


def shifted(
    labels: Tensor, shape: tuple[int, ...], attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Targets [B, T] of labels [B, T]: the next token's label, −100 at pads and at the end of documents.

    Raises:
        TypeError, ValueError: labels that are not integers or of another shape.
    """
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be an int32 or int64 tensor, not {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)} but the input has {tuple(shape)}")
    targets = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORE)
    if attention_mask is not None:
        # A pad predicts nothing and nothing predicts a pad.
        real = attention_mask.bool()
        targets[~(real & F.pad(real[:, 1:], (0, 1)))] = IGNORE
    if cu_seqlens is not None:
        targets[:, cu_seqlens[1:].long() - 1] = IGNORE
    return targets


def sinusoidal(position: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Fixed position code [..., D]: sine on even and cosine on odd channels (Vaswani et al., 2017), float64."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width)
    angle = position[..., None].double() * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)
