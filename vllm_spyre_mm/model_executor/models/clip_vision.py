# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision tower: FMS's SigLIP encoder behind CLIP's own embeddings."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fms.models.siglip_vision import SiglipEncoder, SiglipVisionConfig
from fms.modules.layernorm import LayerNormParameterized
from fms.utils import serialization
from fms.utils.activation import str_to_activation
from torch import nn

from vllm_spyre_mm.model_executor.cpu.bidirectional import hidden_states
from vllm_spyre_mm.model_executor.models.names import renaming_step

ARCHITECTURE = "clip_vision"
"""FMS's name of the architecture, by which its adapter is found."""


@dataclass
class CLIPVisionConfig(SiglipVisionConfig):
    """SigLIP's fields with the values of CLIP ViT-L/14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    nlayers: int = 24
    nheads: int = 16
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU by a sigmoid; FMS has no such activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIPVisionEmbeddings(nn.Module):
    """A class token and the patches, with a learnt embedding for each position."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=False,
        )
        num_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nn.Embedding(num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = self.class_embedding.expand(len(patches), 1, -1)
        embeddings = torch.cat([tokens, patches.flatten(2).transpose(1, 2)], dim=1)
        return embeddings + self.position_embedding.weight


class CLIPVision(nn.Module):
    """CLIP's vision tower without pooling and final norm, which features do not use.

    Args:
        config: shapes; ``hidden_act`` may be ``quick_gelu`` or a name that FMS knows.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = LayerNormParameterized(  # the checkpoints' spelling
            config.hidden_size,
            elementwise_shift=True,
            use_mean=True,
            eps=config.layer_norm_eps,
            use_high_precision_pow=True,
        )
        is_quick = config.hidden_act == "quick_gelu"
        self.encoder = SiglipEncoder(
            dataclasses.replace(config, hidden_act="gelu") if is_quick else config
        )
        layers: Any = self.encoder.layers
        for layer in layers:
            layer.mlp.a = QuickGELU() if is_quick else str_to_activation(config.hidden_act)

    def forward(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Compute the hidden states of square tiles.

        Args:
            pixel_values: ``(tiles, 3, image_size, image_size)``.

        Returns:
            The embeddings and each layer's output in turn, ``(tiles, 1 + patches, hidden_size)``:
            the class token comes first.
        """
        embeddings = self.pre_layrnorm(self.embeddings(pixel_values))
        return hidden_states(embeddings, self.encoder.layers)


# -- serialisation --------------------------------------------------------------------------------

NAMES = (
    (r"^vision_model\.", ""),
    (r"self_attn\.q_proj", "attn.in_proj.query"),
    (r"self_attn\.k_proj", "attn.in_proj.key"),
    (r"self_attn\.v_proj", "attn.in_proj.value"),
    (r"self_attn\.out_proj", "attn.dense"),
    (r"mlp\.fc1", "mlp.w1"),
    (r"mlp\.fc2", "mlp.w2"),
)


def _weight_fusion(
    input_sd: Mapping[str, Any], model_config: CLIPVisionConfig | None = None, **_: Any
) -> Mapping[str, Any]:
    if model_config is not None and not model_config.fused_weights:
        return input_sd
    return serialization._attn_unfused_to_fused_step(input_sd)


serialization.register_adapter_step(ARCHITECTURE, "hf_to_fms_names", renaming_step(NAMES))
serialization.register_adapter_step(ARCHITECTURE, "weight_fusion", _weight_fusion)
serialization.register_adapter(ARCHITECTURE, "hf", ["hf_to_fms_names", "weight_fusion"])
