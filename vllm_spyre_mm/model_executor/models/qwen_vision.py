# SPDX-License-Identifier: Apache-2.0
"""The vision towers of Qwen3-VL, Qwen2.5-VL and Qwen2-VL.

A tower takes the patches of pictures and frames of any size, one after the other. Attention is
within a frame, or within a window of one; the rotation is by a patch's row and column. Squares of
patches become features. Qwen3-VL makes features of several depths (deepstack).
"""

from collections.abc import Mapping
from typing import Any

import torch
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from fms.modules.layernorm import LayerNormParameterized
from fms.utils import serialization
from fms.utils.activation import str_to_activation
from torch import nn

from vllm_spyre_mm.model_executor.cpu.kernels.operands import SegmentedRow
from vllm_spyre_mm.model_executor.cpu.segmented import attend_segments
from vllm_spyre_mm.model_executor.models.clip_vision import QuickGELU
from vllm_spyre_mm.model_executor.models.names import renaming_step
from vllm_spyre_mm.model_executor.models.qwen_vision_config import QwenVisionConfig
from vllm_spyre_mm.model_executor.models.qwen_vision_layout import BatchLayout, batches
from vllm_spyre_mm.model_executor.pieces import Pieces, whole

ARCHITECTURE = "spyre_mm_qwen_vision"
"""FMS's name of the architecture, by which its adapter is found."""

BATCH_PATCHES = 4096
"""Patches of frames that are encoded together; a larger frame is encoded alone.

The linear layers reach their speed with a few hundred rows. More than these fill the caches with
activations, which costs up to a tenth of the speed, and take memory, 25 KB each.
"""


def _norm(config: QwenVisionConfig) -> LayerNormParameterized:
    return LayerNormParameterized(
        config.hidden_size,
        elementwise_shift=not config.rms_norm,
        use_mean=not config.rms_norm,
        eps=config.layer_norm_eps,
        use_high_precision_pow=True,
    )


def _feed_forward(config: QwenVisionConfig) -> nn.Module:
    ratio = config.intermediate_size / config.hidden_size
    if config.gated:
        return GatedLinearUnit(
            config.hidden_size,
            ratio,
            activation_fn=str_to_activation(config.hidden_act),
            p_dropout=0.0,
            fused=config.fused_weights,
        )
    is_quick = config.hidden_act == "quick_gelu"
    activation = QuickGELU() if is_quick else str_to_activation(config.hidden_act)
    return FeedForwardBlock(config.hidden_size, ratio, activation_fn=activation, p_dropout=0.0)


class SegmentedAttention(nn.Module):
    """Attention of a segment's patches to each other, with rotated queries and keys."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.width, self.heads = config.hidden_size, config.nheads
        self.scale = config.head_dim**-0.5
        self.qkv = nn.Linear(self.width, 3 * self.width)
        self.proj = nn.Linear(self.width, self.width)

    def forward(
        self, x: torch.Tensor, rope_table: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`QwenVisionBlock`."""
        query, keys, values = (
            part.view(1, -1, self.heads, self.width // self.heads)
            for part in self.qkv(x).split(self.width, dim=-1)
        )
        row = SegmentedRow(query, keys, values, rope_table, segments)
        attended = attend_segments(row, self.scale)
        return self.proj(attended.view(1, -1, self.width))


class QwenVisionBlock(nn.Module):
    """A block of a tower: attention and a feed-forward part, each after a norm."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = SegmentedAttention(config)
        self.ff_sub_layer = _feed_forward(config)

    def forward(
        self, x: torch.Tensor, rope_table: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """Compute the block.

        Args:
            x: ``(1, patches, hidden_size)``.
            rope_table: fp32 ``(patches, head_dim)``, cosine and sine of each pair of a head.
            segments: int32 ``(segments + 1,)``, their bounds; the last is the number of patches.

        Returns:
            Like ``x``.
        """
        x = x + self.attn(self.norm1(x), rope_table, segments)
        return x + self.ff_sub_layer(self.norm2(x))


class PatchMerger(nn.Module):
    """Makes a feature of each square of patches.

    Args:
        config: of the tower.
        joins_first: whether the norm is of the joined patches of a square, and not of each.
    """

    def __init__(self, config: QwenVisionConfig, *, joins_first: bool = False) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm_width = self.width if joins_first else config.hidden_size
        norm = nn.RMSNorm if config.rms_norm else nn.LayerNorm
        self.norm = norm(self.norm_width, eps=config.layer_norm_eps)
        self.w1 = nn.Linear(self.width, self.width)
        self.a = nn.GELU()
        self.w2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(1, patches, hidden_size)`` to ``(features, out_hidden_size)``."""
        normed = self.norm(x.reshape(-1, self.norm_width))
        return self.w2(self.a(self.w1(normed.reshape(-1, self.width))))


class QwenVision(nn.Module):
    """A tower with its mergers.

    Args:
        config: shapes, and which generation's parts it has.
    """

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = nn.Linear(config.patch_values, width, bias=config.patch_bias)
        self.pos_embed = None
        if config.num_position_embeddings:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, width)
        self.blocks = nn.ModuleList(QwenVisionBlock(config) for _ in range(config.nlayers))
        self.merger = PatchMerger(config)
        self.deepstack_mergers = nn.ModuleList(
            PatchMerger(config, joins_first=True) for _ in config.deepstack_layers
        )

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Encode at once; see :meth:`pieces`."""
        return whole(self.pieces(pixel_values, grid_thw))

    def pieces(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> Pieces[torch.Tensor]:
        """Encode pictures and videos of any number and size; yields after each block.

        Args:
            pixel_values: ``(patches, channels * temporal * patch * patch)`` of all items, in the
                order of Transformers' processors: square by square.
            grid_thw: int64 ``(items, 3)``: frames, and rows and columns of patches.

        Returns:
            ``(features, out_hidden_size * (1 + levels))``, one for each square: the columns of the
            decoder's input, then those of each level of deepstack.
        """
        sizes = grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0).tolist()
        patches = sum(rows * columns for rows, columns in sizes)
        assert patches == len(pixel_values), "the grids are of these patches"
        parts, first = [], 0
        for batch in batches([(rows, columns) for rows, columns in sizes], BATCH_PATCHES):
            count = sum(rows * columns for rows, columns in batch)
            layout = BatchLayout(batch, self.config)
            parts.append((yield from self._encode(pixel_values[first : first + count], layout)))
            first += count
        return torch.cat(parts)

    def _encode(self, pixel_values: torch.Tensor, layout: BatchLayout) -> Pieces[torch.Tensor]:
        config = self.config
        order = layout.square_order() if config.window else None
        pixels = pixel_values.to(self.patch_embed.weight.dtype)
        if order is not None:
            pixels = pixels.reshape(len(order), -1).index_select(0, order).view(pixels.shape)
        x = self.patch_embed(pixels)
        if self.pos_embed is not None:
            x += layout.learnt_positions(self.pos_embed.weight).to(x.dtype)
        x, rope_table = x.unsqueeze(0), layout.rope_table()
        levels: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            in_windows = config.window and i not in config.full_attention_layers
            segments = layout.window_segments if in_windows else layout.frame_segments
            x = block(x=x, rope_table=rope_table, segments=segments)
            if i in config.deepstack_layers:
                levels.append(self.deepstack_mergers[len(levels)](x))
            yield
        features = torch.cat([self.merger(x), *levels], dim=-1)
        return features if order is None else features.index_select(0, order.argsort())


# -- serialisation --------------------------------------------------------------------------------

NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^deepstack_merger_list\.", "deepstack_mergers."),
    (r"\.mlp\.(linear_)?fc1\.", ".ff_sub_layer.w1."),
    (r"\.mlp\.(linear_)?fc2\.", ".ff_sub_layer.w2."),
    (r"\.mlp\.gate_proj\.", ".ff_sub_layer.wg."),
    (r"\.mlp\.up_proj\.", ".ff_sub_layer.w1."),
    (r"\.mlp\.down_proj\.", ".ff_sub_layer.w2."),
    (r"^merger\.ln_q\.", "merger.norm."),
    (r"^merger\.mlp\.0\.", "merger.w1."),
    (r"^merger\.mlp\.2\.", "merger.w2."),
    (r"(merger.*)\.linear_fc([12])\.", r"\1.w\2."),
)


def _hf_to_fms_layout(
    input_sd: Mapping[str, Any], model_config: QwenVisionConfig | None = None, **_: Any
) -> dict[str, Any]:
    """Flatten the patches' convolution, and order a head's rows for FMS's RoPE: of neighbours."""
    assert model_config is not None, "the order is that of the heads"
    ordered = dict(input_sd)
    for name, tensor in input_sd.items():
        if name == "patch_embed.weight":
            ordered[name] = tensor.flatten(1)
        if ".attn.qkv." in name:
            query, keys, values = tensor.unflatten(0, (3, model_config.nheads, 2, -1))
            pairs = [part.transpose(1, 2).flatten(0, 2) for part in (query, keys)]
            ordered[name] = torch.cat([*pairs, values.flatten(0, 2)])
    return ordered


def _weight_fusion(
    input_sd: Mapping[str, Any], model_config: QwenVisionConfig | None = None, **_: Any
) -> Mapping[str, Any]:
    if model_config is None or not (model_config.gated and model_config.fused_weights):
        return input_sd
    return serialization._mlp_glu_unfused_to_fused_adapter_step(input_sd)


serialization.register_adapter_step(ARCHITECTURE, "hf_to_fms_names", renaming_step(NAMES))
serialization.register_adapter_step(ARCHITECTURE, "hf_to_fms_layout", _hf_to_fms_layout)
serialization.register_adapter_step(ARCHITECTURE, "weight_fusion", _weight_fusion)
serialization.register_adapter(
    ARCHITECTURE, "hf", ["hf_to_fms_names", "hf_to_fms_layout", "weight_fusion"]
)
