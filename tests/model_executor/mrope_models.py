# SPDX-License-Identifier: Apache-2.0
"""Decoders with positions on three axes, and Transformers' text models as their references."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    PretrainedConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLTextConfig,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from tests import architectures
from vllm_spyre_mm.model_executor.models.composition import CompositionConfig
from vllm_spyre_mm.model_executor.models.mrope import MRope
from vllm_spyre_mm.multimodal.mm_mappings.text import TextDecoder

HEAD_DIM = 128
THETA = 30.0
"""So low that a step of 1 turns every frequency by an angle that counts."""

ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
SECTIONED, INTERLEAVED = MRope((16, 24, 24), False), MRope((24, 20, 20), True)


@dataclasses.dataclass(frozen=True)
class Family:
    """One of the three, as far as its decoder goes.

    Attributes:
        text: a text model with the same weights, which is stored.
        config_class: Transformers' configuration of the decoder with three axes.
        model_class: Transformers' decoder with three axes.
        mrope: of its published models.
    """

    text: PretrainedConfig
    config_class: type[Any]
    model_class: type[Any]
    mrope: MRope

    @property
    def vl_config(self) -> Any:
        """Transformers' configuration of the decoder with three axes."""
        rope = ROPE["rope_parameters"] | {"mrope_section": [*self.mrope.sections]}
        names = (*architectures.DECODER, "head_dim")
        given = {name: getattr(self.text, name) for name in names if hasattr(self.text, name)}
        return self.config_class(**given, rope_parameters=rope)


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * HEAD_DIM}
FAMILIES = {
    "Qwen2-VL": Family(
        architectures.qwen2(**HEADS, **ROPE), Qwen2VLTextConfig, Qwen2VLTextModel, SECTIONED
    ),
    "Qwen2.5-VL": Family(
        architectures.qwen2(**HEADS, **ROPE), Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, SECTIONED
    ),
    "Qwen3-VL": Family(
        architectures.qwen3(head_dim=HEAD_DIM, **ROPE),
        Qwen3VLTextConfig,
        Qwen3VLTextModel,
        INTERLEAVED,
    ),
}


class ThreeAxes(TextDecoder):
    """A text model whose positions have three axes."""

    mrope: MRope

    def composition(self, for_card: bool) -> CompositionConfig:
        return dataclasses.replace(super().composition(for_card), mrope=self.mrope)


def mapping_of(family: Family, hf_config: Any) -> ThreeAxes:
    """The mapping of a stored text model, with positions on three axes."""
    mapping = ThreeAxes(hf_config)
    mapping.mrope = family.mrope
    return mapping


class ReferenceDecoder:
    """A decoder as Transformers runs it, on the tensors of a text model's checkpoint."""

    def __init__(self, family: Family, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        self.head = tensors.pop("lm_head.weight")
        self.model = family.model_class(family.vl_config).eval()
        self.model.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        )

    @torch.inference_mode()
    def logits(self, token_ids: list[int], positions: torch.Tensor) -> torch.Tensor:
        """Logits ``(tokens, vocab_size)`` at int64 positions ``(3, tokens)``."""
        embeds = self.model.embed_tokens(torch.tensor([token_ids]))
        states = self.model(
            inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False
        ).last_hidden_state
        return states[0] @ self.head.T


def positions_with_picture(
    before: int, rows: int, columns: int, after: int
) -> tuple[torch.Tensor, int]:
    """Positions of a prompt with one picture, written by hand: int64 ``(3, tokens)``, and the
    distance of a later token's position from its index."""
    text = torch.arange(before).expand(3, -1)
    grid = torch.tensor([[0, row, column] for row in range(rows) for column in range(columns)]).T
    first = before + max(rows, columns)
    behind = torch.arange(first, first + after).expand(3, -1)
    return torch.cat((text, grid + before, behind), dim=1), max(rows, columns) - rows * columns
