# SPDX-License-Identifier: Apache-2.0
"""Qwen 2's decoder, which FMS lacks: Mistral's with biases on queries, keys and values.

FMS's attention has biases on all four projections or on none; here the output projection has none.
"""

from typing import Any

from fms.distributed.strategy import DistributedStrategy, NoOpStrategy
from fms.models.mistral import Mistral, MistralConfig
from fms.modules.attention import MultiHeadAttention, TPMultiHeadAttention
from torch.distributed import ProcessGroup


class Qwen2Attention(MultiHeadAttention):
    """FMS's attention with biases on queries, keys and values.

    Args:
        config: of the decoder.
        position_encoder: FMS's; applied to queries and keys.
    """

    def __init__(self, config: MistralConfig, position_encoder: Any) -> None:
        super().__init__(
            config.emb_dim,
            config.head_dim,
            config.head_dim,
            config.nheads,
            config.kvheads,
            p_dropout=config.p_dropout,
            use_bias=True,
            position_encoder=position_encoder,
            fused=config.fused_weights,
            linear_config=config.linear_config,
        )
        self.dense.register_parameter("bias", None)

    def to_tp(self, group: ProcessGroup) -> TPMultiHeadAttention:
        """This rank's part of the attention."""
        attention = super().to_tp(group)
        attention.dense.register_parameter("bias", None)
        return attention


class Qwen2(Mistral):
    """FMS's Mistral with :class:`Qwen2Attention` in its layers.

    Args:
        config: of the decoder.
        distributed_strategy: shards its layers.
    """

    def __init__(
        self,
        config: MistralConfig,
        distributed_strategy: DistributedStrategy = NoOpStrategy,
    ) -> None:
        super().__init__(config)
        base: Any = self.base_model
        for index, block in enumerate(base.layers):
            block.attn = Qwen2Attention(config, base.rot_emb)
            base.layers[index] = distributed_strategy.distribute_layer(block, index)
