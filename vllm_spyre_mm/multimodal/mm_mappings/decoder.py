# SPDX-License-Identifier: Apache-2.0
"""The base class of the mappings whose model has a decoder that FMS runs."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_spyre_mm.model_executor.mistral_layout import MistralLayout
from vllm_spyre_mm.model_executor.models.composition import (
    ARCHITECTURE,
    DECODER,
    Composition,
    CompositionConfig,
)
from vllm_spyre_mm.model_executor.models.decoders import DECODERS, head_dim_of, padding_decoder
from vllm_spyre_mm.model_executor.spec import FmsModel, KVCacheOptions, LMHead, LoadOverrides
from vllm_spyre_mm.multimodal.mm_mappings.base import MMUtils, UnsupportedModelError

CARD_HEAD_DIM = 128
"""Width of a head that the card's compiler expects."""

MISTRAL_DECODERS, MISTRAL_TOWER = ("mistral", "ministral3"), "pixtral"
"""Parts whose weights there are in Mistral's own format."""

HEAD, EMBEDDING = f"{DECODER}.lm_head.weight", f"{DECODER}.model.embed_tokens.weight"
"""Weights of the LM head and the embedding, as :meth:`DecoderMapping.rename` names them."""


JOINED_PATCHES = 512
"""Patches of pictures of several requests that go through the tower together.

From some 256 on the linear layers are as fast as they get; with more, only the first picture waits
longer.
"""


class DecoderMapping(MMUtils):
    """Base class of mappings whose model is a :class:`Composition`, with or without a tower."""

    model_class: ClassVar[type[Composition]] = Composition

    @property
    def text_config(self) -> Any:
        return self.hf_config.text_config

    @property
    def encoder_head_dim(self) -> int | None:
        vision = getattr(self.hf_config, "vision_config", None)
        return None if vision is None else vision.hidden_size // vision.num_attention_heads

    def kv_cache_options(self, for_card: bool = False) -> KVCacheOptions:
        text = self.text_config
        own = head_dim_of(text)
        return KVCacheOptions(
            num_layers=text.num_hidden_layers,
            num_kv_heads=text.num_key_value_heads,
            head_dim=self._card_head_dim(own) if for_card else own,
        )

    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        config = self.composition(for_card)
        untied = dataclasses.replace(
            config, text_config=config.text_config.updated(tie_heads=False)
        )
        tied = self.hf_config.tie_word_embeddings
        return LoadOverrides(
            architecture=ARCHITECTURE,
            model_class=self.model_class,
            config=config,
            rename=self.rename,
            is_unused=self.is_unused,
            head=LMHead(HEAD, EMBEDDING, tied, untied, self.tie_settings),
            encoder_modules=(),
            encoder_blocks=lambda _: nn.ModuleList(),
            decoder_blocks=lambda model: model.language_model.base_model.layers,
            deepstack_levels=len(config.deepstack_layers),
            mistral_layout=self._mistral_layout(),
        )

    def _mistral_layout(self) -> MistralLayout | None:
        text, vision = self.text_config, getattr(self.hf_config, "vision_config", None)
        if text.model_type not in MISTRAL_DECODERS:
            return None
        if vision is not None and vision.model_type != MISTRAL_TOWER:
            return None
        return MistralLayout(head_dim_of(text), self.encoder_head_dim)

    @property
    def tie_settings(self) -> str:
        """The configuration's setting that ties the LM head to the embedding, in words.

        Transformers reads the whole model's setting; see :class:`VisionLanguageMapping`.
        """
        return f"tie_word_embeddings is {self.hf_config.tie_word_embeddings}"

    def composition(self, for_card: bool) -> CompositionConfig:
        """The parts of the model; see :meth:`load_overrides` for ``for_card``."""
        text = self.text_config
        own = head_dim_of(text)
        padded = self._card_head_dim(own) if for_card else own
        decoder = DECODERS[text.model_type] if padded == own else padding_decoder(text)
        assert decoder is not None, "the heads can be padded"
        return CompositionConfig(
            decoder=decoder,
            text_config=decoder.config(
                text,
                tied=self.hf_config.tie_word_embeddings,
                head_dim=padded if padded != own else None,
            ),
            fused_weights=not for_card,
        )

    def _card_head_dim(self, own: int) -> int:
        """Width of a head on the card.

        Raises:
            UnsupportedModelError: the heads cannot be padded to it.
        """
        pads = padding_decoder(self.text_config) is not None
        if own != CARD_HEAD_DIM and (not pads or CARD_HEAD_DIM % own):
            raise UnsupportedModelError(
                f"heads of {own} cannot be padded to the {CARD_HEAD_DIM} that the card wants"
            )
        return CARD_HEAD_DIM

    def rename(self, name: str) -> str:
        """A tensor's name as Transformers 4 wrote it, with the decoder below ``language_model.``.

        A text model is stored as its decoder alone.
        """
        return f"{DECODER}.{name}"

    def is_unused(self, name: str) -> bool:
        """Whether a tensor has no part in the computation: tables that old versions stored."""
        return name.endswith(".rotary_emb.inv_freq")

    def embed_tokens(self, model: FmsModel, token_ids: torch.Tensor) -> torch.Tensor:
        return model.embed(token_ids)


def as_text_model(text: Any, model_type: str, **changes: Any) -> Any:
    """A decoder's configuration as that of a text model.

    Args:
        text: the Transformers configuration of a decoder that has a name of its own.
        model_type: Transformers' name of the text model.
        changes: values in place of the decoder's.
    """
    from transformers import AutoConfig

    given = text.to_dict()
    del given["model_type"]
    return AutoConfig.for_model(model_type, **given | changes)
