"""Adapters to transformers: the plain model behind the interfaces that its users know.

Importing this module registers the classes with ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from hqlt.layers.linear import Linear
from hqlt.layers.state import ModelState
from hqlt.models.cache import HQLTCache
from hqlt.models.configuration_hqlt import HQLTConfig
from hqlt.models.inputs_hqlt import new_mask, own_cache, packed_borders
from hqlt.models.language_model import IGNORE, LanguageModel, shifted

_takes_old_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as the models of transformers do


class HQLTPreTrainedModel(PreTrainedModel):
    """What the models share: the plain model under ``model``, its initialisation and its embeddings."""

    config_class = HQLTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    config: HQLTConfig
    model: LanguageModel

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model)
        if self.model.norm.weight.device.type != "meta":
            # Drawn above, in the order of the plain model: the same seed gives the same weights.
            for module in self.modules():
                module._is_hf_initialized = True

    def _init_weights(self, module: nn.Module) -> None:
        self.model.init_module(module)
        self.model.rescale_module(module)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding; the vocabulary becomes as large as it is."""
        self.model.set_embedding(value)
        self.config.vocab_size = value.num_embeddings

    def _collected(self, hidden_states: bool | None, attentions: bool | None) -> list[Tensor] | None:
        """Where to collect hidden states, if they are wanted."""
        if attentions or (attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions: there are no attention weights to return, half of the memory is a matrix"
            )
        return [] if (self.config.output_hidden_states if hidden_states is None else hidden_states) else None

    def _run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
        hidden_states: list[Tensor] | None,
    ) -> tuple[Tensor, ModelState, Tensor | None]:
        """Hidden states [B, T, D], the next state and the mask of the new tokens."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if input_ids is not None:
            self.model.check_ids(input_ids)
            inputs_embeds = self.model.embedding(input_ids)
        assert inputs_embeds is not None
        past = own_cache(cache)
        mask = new_mask(attention_mask, inputs_embeds.shape[:2], past)
        state = None if past is None else past.state
        if past is not None and state is None and past.is_croppable:
            state = self.model.empty_state(inputs_embeds.shape[0], inputs_embeds).track()
        hidden, state = self.model.encode(
            inputs_embeds,
            state,
            attention_mask=mask,
            cu_seqlens=cu_seqlens,
            hidden_states=hidden_states,
        )
        return hidden, state, mask

    def _next_cache(
        self, past: Cache | None, state: ModelState, tokens: int, use_cache: bool | None, padded: bool
    ) -> HQLTCache | None:
        if use_cache is None:
            use_cache = past is not None or (self.config.use_cache and not self.training)
        if not use_cache:
            return None
        cache = own_cache(past)
        cache = HQLTCache() if cache is None else cache
        cache.advance(state, tokens, padded)
        return cache


class HQLTModel(HQLTPreTrainedModel):
    """Embedding, blocks and final norm of an HQLT."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]  # noqa: RUF012

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.model.head = nn.Identity()  # type: ignore[assignment]
        self.post_init()

    @can_return_tuple
    @_takes_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm; arguments as :meth:`HQLTForCausalLM.forward`."""
        cu_seq_lens_q = packed_borders(cu_seq_lens_q, packing)
        layers = self._collected(output_hidden_states, output_attentions)
        hidden, state, mask = self._run(
            input_ids, inputs_embeds, attention_mask, cache, cu_seq_lens_q, layers
        )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            cache=self._next_cache(cache, state, hidden.shape[1], use_cache, mask is not None),
            hidden_states=_with_last(layers, hidden),
        )


class HQLTForCausalLM(HQLTPreTrainedModel, GenerationMixin):
    """An HQLT language model for transformers: loading, saving, generation, fine-tuning.

    ``model`` is the plain :class:`hqlt.LanguageModel`. The cache is an :class:`HQLTCache`, whose size does not grow
    with the text where every KV memory has a window.
    """

    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: HQLTConfig) -> None:
        super().__init__(config)
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel, **values: Any) -> HQLTForCausalLM:
        """Around a plain model, whose weights it shares; ``values`` are fields of transformers' configuration."""
        with torch.device("meta"):
            adapter = cls(HQLTConfig.of(model.config, **values))
        adapter.model = model
        adapter.train(model.training)
        return adapter

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head's weight."""
        width, size = new_embeddings.in_features, new_embeddings.out_features
        self.model.head = Linear(width, size, bias=False, device="meta")
        self.model.head.weight = new_embeddings.weight

    @can_return_tuple
    @_takes_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        skip_logits: bool | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token and, with labels, the loss.

        Args:
            input_ids: [B, T] token ids; or ``inputs_embeds`` [B, T, D] in their place.
            attention_mask: 1 at real tokens, for the new ones [B, T] or for all since the cache was empty.
            cache: the :class:`HQLTCache` of an earlier call, which is advanced in place.
            labels: [B, T], −100 is ignored; shifted here.
            use_cache: whether to return the cache, advanced; by default if one is given, and in evaluation mode.
            output_hidden_states: also return what enters each block, and the last hidden states.
            output_attentions: must not be True: FW memory has no attention weights.
            logits_to_keep: how many last positions, or which positions, get logits; 0 is all.
            num_items_in_batch: divides the summed loss instead of the number of targets (gradient accumulation).
            cu_seq_lens_q: borders 0, …, T of documents packed into one row.
            packing: what collators add to it (``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``, ``seq_idx``), or
                ``position_ids`` that begin again at every document, in its place.
            skip_logits: with labels, return the loss alone and never hold the logits of all positions; by default in
                training.

        Raises:
            TypeError, ValueError: as :meth:`hqlt.LanguageModel.forward`; a cache of another kind or model.
        """
        layers = self._collected(output_hidden_states, output_attentions)
        cu_seq_lens_q = packed_borders(cu_seq_lens_q, packing)
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be a number of positions, 0 for all, or a tensor")
        if (
            cache is not None
            and use_cache is not False
            and (inputs_embeds, labels, layers, cu_seq_lens_q) == (None,) * 4
        ):
            logits = self._compiled_step(input_ids, attention_mask, cache)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, cache=cache)
        hidden, state, mask = self._run(
            input_ids, inputs_embeds, attention_mask, cache, cu_seq_lens_q, layers
        )  # fmt: skip
        loss = None
        if labels is not None:
            if not isinstance(labels, Tensor):
                raise TypeError(f"labels must be a tensor, not {type(labels).__name__}")
            targets = shifted(labels.to(hidden.device), hidden.shape[:2], mask, cu_seq_lens_q)
            if num_items_in_batch is None and not bool((targets != IGNORE).any()):
                loss = hidden.sum().float() * torch.nan  # the mean of nothing, as transformers has it
            else:
                loss = self.model.target_loss(hidden, targets, num_items_in_batch)
        skip = labels is not None and (self.training if skip_logits is None else skip_logits)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip else self.model.head(hidden[:, kept]),
            cache=self._next_cache(cache, state, hidden.shape[1], use_cache, mask is not None),
            hidden_states=_with_last(layers, hidden),
        )

    def _compiled_step(self, input_ids: Tensor | None, mask: Tensor | None, past: Cache) -> Tensor | None:
        """Logits [B, 1, V] from the cache's decoder; None where it has none, or for more than a token per document."""
        cache = own_cache(past)
        if cache is None or input_ids is None or input_ids.shape[1] != 1:
            return None
        if cache.decoder is not None and cache.decoder.model is not self.model:
            raise ValueError("the decoder of the cache belongs to another model; make one of this model")
        if new_mask(mask, input_ids.shape, cache) is not None:
            return None
        logits = cache.step(input_ids[:, 0])
        return None if logits is None else logits[:, None]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        own_cache(model_kwargs.get("cache"))
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not for this model, whose memory "
                "has a fixed size; for compiled steps pass cache=HQLTCache(decoder=hqlt.Decoder(model.model))"
            )
        if model_kwargs.get("cache") is None:
            model_kwargs["cache"] = HQLTCache()
        if generation_config.is_assistant:
            model_kwargs["cache"].activate_past_recording()

    # Whether the tokens of a cache that is given have yet to be left out of the prompt: transformers does so in all
    # kinds of generation but this one.
    _assisted = False

    def _assisted_decoding(self, *arguments: Any, **options: Any) -> Any:
        cache = own_cache(options.get("cache"))
        recorded = cache is not None and cache.is_croppable
        self._assisted = True
        try:
            return super()._assisted_decoding(*arguments, **options)
        finally:
            self._assisted = False
            if cache is not None and not recorded:
                cache.deactivate_past_recording()

    @_takes_old_name
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,  # under this name: ``generate`` looks for it
    ) -> dict[str, Any]:
        """What one step of ``generate`` passes to :meth:`forward`."""
        seen = 0 if cache is None else cache.get_seq_length()
        if self._assisted and kwargs.get("is_first_iteration") and next_sequence_length is None and seen:
            next_sequence_length = input_ids.shape[1] - seen
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, cache=cache, **kwargs
        )
        return inputs


def _with_last(layers: list[Tensor] | None, hidden: Tensor) -> tuple[Tensor, ...] | None:
    """Inputs of the blocks and, as transformers has it, the normalised output in place of the last block's."""
    return None if layers is None else (*layers[:-1], hidden)


# Trainer asks here whether the labels of a model are shifted (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hqlt"] = "HQLTForCausalLM"
AutoConfig.register("hqlt", HQLTConfig)
AutoModel.register(HQLTConfig, HQLTModel)
AutoModelForCausalLM.register(HQLTConfig, HQLTForCausalLM)
