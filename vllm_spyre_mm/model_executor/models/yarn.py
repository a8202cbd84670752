# SPDX-License-Identifier: Apache-2.0
"""Ministral 3's decoder with the YaRN RoPE frequencies that Transformers computes.

FMS rounds the range in which YaRN interpolates before it divides, not after, so its frequencies
differ a little from the model's.
"""

from typing import Any

import torch
from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.models.ministral3 import Ministral3Text, Ministral3TextConfig
from fms.modules.positions import CachedYarnRotaryEmbedding


class YarnRotaryEmbedding(CachedYarnRotaryEmbedding):
    """FMS's YaRN RoPE with Transformers' frequencies.

    Args:
        config: of the decoder; ``rope_parameters`` are Transformers'.
    """

    def __init__(self, config: Ministral3TextConfig) -> None:
        rope = config.rope_parameters
        super().__init__(
            dim=config.head_dim,
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            base=rope["rope_theta"],
            scaling_factor=rope["factor"],
            llama_4_scaling_beta=rope["llama_4_scaling_beta"],
        )
        self._config = config

    def compute_freqs_cis(self, device: torch.device, max_seq_len: int) -> None:
        """Make the cos/sin table, once for a device, of the model's length, not ``max_seq_len``."""
        if device == torch.device("meta") or device.index in self.cached_freqs:
            return
        from transformers import Ministral3Config
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = Ministral3Config(
            head_dim=self._config.head_dim,
            max_position_embeddings=self._config.max_expected_seq_len,
            rope_parameters=dict(self._config.rope_parameters),
        )
        frequencies, self.attn_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device)
        self.cached_freqs[device.index] = self._compute_cos_sin_cache(
            frequencies, device, self._config.max_expected_seq_len
        )


class Ministral3Decoder(Ministral3Text):
    """FMS's decoder with :class:`YarnRotaryEmbedding` in its layers."""

    def __init__(
        self,
        config: Ministral3TextConfig,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
    ) -> None:
        super().__init__(config, distributed_strategy)
        rope: Any = YarnRotaryEmbedding(config)
        self.base_model.rot_emb = rope
        blocks: Any = self.base_model.layers
        for block in blocks:
            block.attn.position_encoder = rope
