# SPDX-License-Identifier: Apache-2.0
"""A composition: any vision tower, a projector and any FMS decoder as one model in FMS's style.

A checkpoint's tensors go through the adapters that FMS has for the parts; see :func:`_adapt`. A
composition without a tower is a text model.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.models.llava_next import LlavaNext
from fms.utils import serialization
from fms.utils.config import ModelConfig
from torch import nn

from vllm_spyre_mm.model_executor.models.decoders import Decoder
from vllm_spyre_mm.model_executor.models.deepstack import Deepstack
from vllm_spyre_mm.model_executor.models.mrope import MRope, set_step_rope
from vllm_spyre_mm.model_executor.models.towers import Encoder, Tower
from vllm_spyre_mm.model_executor.pieces import Pieces

ARCHITECTURE = "spyre_mm_composition"
"""FMS's name of the architecture, by which its adapter is found."""

DECODER = "language_model"
TOWER = "vision_tower"
PROJECTOR = "multi_modal_projector"
NEWLINE = "image_newline"


@dataclass
class CompositionConfig(ModelConfig):
    """The parts of a composition; FMS's projectors and tile functions read fields by these names.

    Attributes:
        decoder: the decoder.
        text_config: the decoder's FMS configuration.
        tower: the vision tower, None for a text model.
        vision_config: the tower's FMS configuration.
        projector: makes the projector from this configuration; None where the tower has one.
        vision_feature_layer: indices of the hidden states that make features, from the front.
        drop_class_token: leave out the tower's first position.
        projector_hidden_act: activation of the projector.
        multimodal_projector_bias: whether its linear layers have a bias.
        spatial_merge_size: patches on the side of a square that becomes one feature.
        newline: whether a learnt feature ends each row of patches.
        deepstack_layers: for each level of the features beside the input's, the index of the
            decoder layer before whose input it is added.
        image_grid_pinpoints: ``(height, width)`` of the grids of tiles.
        fused_weights: whether projections may be fused.
        mrope: the axes of the decoder's positions; None for one axis.
    """

    decoder: Decoder
    text_config: ModelConfig
    tower: Encoder | None = None
    vision_config: ModelConfig | None = None
    projector: Callable[["CompositionConfig"], nn.Module] | None = None
    vision_feature_layer: int | list[int] = -1
    drop_class_token: bool = False
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    spatial_merge_size: int = 1
    newline: bool = False
    deepstack_layers: tuple[int, ...] = ()
    image_grid_pinpoints: list[list[int]] = field(default_factory=list)
    fused_weights: bool = True
    mrope: MRope | None = None


class TextEmbedding(nn.Embedding):
    """Looks up token ids and passes embeddings through; some FMS decoders look up any input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.is_floating_point() else super().forward(x)


class Composition(nn.Module):
    """A decoder with the vision tower and the projector that make its image features.

    Args:
        config: the parts.
        distributed_strategy: shards the decoder; the other parts are replicated on each rank.
    """

    def __init__(
        self,
        config: CompositionConfig,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
    ) -> None:
        super().__init__()
        self.config = config if config.fused_weights else _unfused(config)
        text = self.config.text_config
        self.language_model: Any = config.decoder.model_class(text, distributed_strategy)
        base: Any = self.language_model.base_model
        width = base.embedding.embedding_dim
        base.embedding = TextEmbedding(base.embedding.num_embeddings, width)
        if config.mrope is not None:
            set_step_rope(base, config.mrope)
        self.deepstack = Deepstack(base.layers, config.deepstack_layers)
        if config.tower is not None:
            self.vision_tower: Any = config.tower.build(self.config.vision_config)
        if config.projector is not None:
            self.multi_modal_projector: Any = config.projector(self.config)
        if config.newline:
            self.image_newline = nn.Parameter(torch.empty(width))

    def post_init(self) -> None:
        """Tie the head and compute tables of what is loaded, now that there is storage."""
        parts: list[Any] = [self.language_model, getattr(self, TOWER, None)]
        for part in parts:
            if hasattr(part, "post_init"):
                part.post_init()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings ``(batch, length, hidden_size)`` of int64 ``(batch, length)``."""
        return self.language_model.base_model.embedding(token_ids)

    def select_hidden_states(self, pixel_values: torch.Tensor) -> Pieces[torch.Tensor]:
        """The projector's input ``(tiles, patches, layers * hidden_size)``, from the tower.

        It yields after the embeddings and after each layer.
        """
        assert isinstance(self.config.tower, Tower), "another encoder makes features itself"
        states = self.config.tower.hidden_states(self.vision_tower, pixel_values)
        layers = self.config.vision_feature_layer
        wanted = [layers] if isinstance(layers, int) else layers
        kept = {}
        for i, state in enumerate(states):
            if i in wanted:
                kept[i] = state
            yield
        selected = torch.cat([kept[i] for i in wanted], dim=-1)
        return selected[:, 1:] if self.config.drop_class_token else selected

    def forward(
        self,
        input_ids_or_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_value_states: Any = None,
        use_cache: bool = False,
        deepstack: tuple[torch.Tensor, ...] = (),
        **attn_kwargs: Any,
    ) -> Any:
        """Run the decoder; see FMS's decoders, and :class:`Deepstack` for its levels."""
        self.deepstack.levels = deepstack
        output = self.language_model(
            input_ids_or_embeds,
            position_ids=position_ids,
            past_key_value_states=past_key_value_states,
            use_cache=use_cache,
            **attn_kwargs,
        )
        self.deepstack.levels = ()
        return output


class TiledComposition(Composition):
    """A composition whose images are cut into tiles, by the arithmetic of FMS's LLaVA-Next."""

    image_size_to_num_patches = LlavaNext.image_size_to_num_patches
    select_best_resolution = LlavaNext.select_best_resolution
    unpad_image: Any = LlavaNext.unpad_image  # a subclass may have its own
    pack_image_features = LlavaNext.pack_image_features


def _unfused(config: CompositionConfig) -> CompositionConfig:
    """A copy of the configuration whose parts have separate projections."""
    config = copy.deepcopy(config)
    for part in (config.text_config, config.vision_config):
        if part is not None:
            part.fused_weights = False  # type: ignore[attr-defined]  # FMS's base has no fields
    return config


# -- serialisation --------------------------------------------------------------------------------


def _adapt(input_sd: Mapping[str, Any], **kwargs: Any) -> Mapping[str, Any]:
    """Give each part's tensors to the adapter that FMS has for the part."""
    model_config: CompositionConfig = kwargs["model_config"]
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in input_sd.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    adapted: dict[str, Any] = {}
    for part, tensors in parts.items():
        spec: Decoder | Encoder | None = (
            model_config.decoder if part == DECODER else model_config.tower
        )
        if part not in (DECODER, TOWER) or spec is None:
            adapted |= {f"{part}.{rest}" if rest else part: t for rest, t in tensors.items()}
            continue
        own = model_config.text_config if part == DECODER else model_config.vision_config
        result = serialization.get_adapted(
            spec.adapter,
            "hf",
            {f"{spec.prefix}{rest}": tensor for rest, tensor in tensors.items()},
            {"model_config": model_config if spec.prefix else own},
        )
        adapted |= {
            f"{part}.{name.removeprefix(spec.prefix)}": tensor for name, tensor in result.items()
        }
    return adapted


serialization.register_adapter_step(ARCHITECTURE, "adapt_parts", _adapt)
serialization.register_adapter(ARCHITECTURE, "hf", ["adapt_parts"])
