# SPDX-License-Identifier: Apache-2.0
"""The model as the runner uses it: embed, encode and run, whatever executes the decoder."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.config import Backend
from vllm_spyre_mm.model_executor.cpu.attention import (
    CARD_ATTENTION,
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    register_cpu_attention,
)
from vllm_spyre_mm.model_executor.cpu.compile import (
    compile_decoder_blocks,
    compile_encoder_blocks,
    compile_for_card,
    cpu_compile_context,
    warmup_context,
)
from vllm_spyre_mm.model_executor.cpu.kernels import registry as kernel_registry
from vllm_spyre_mm.model_executor.cpu.kernels.rotary import replace_rotary
from vllm_spyre_mm.model_executor.cpu.linear import replace_linears
from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.multimodal.mm_mappings.base import FmsModel, MMUtils


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """One forward pass of the decoder; made by ``worker.prefill`` and ``worker.decode``.

    All on the host; *padded* as in :mod:`vllm_spyre_mm.scheduler.geometry`. On the CPU the batch is
    1: the tokens of all sequences are in one row.

    Attributes:
        embeds: ``(batch, length, hidden_size)``, the decoder's dtype.
        position_ids: int64 ``(batch, length)``: positions in real tokens, 0 on padding.
        attention: keyword arguments of the attention op: ``slot_mapping`` int64
            ``(batch, length)``; for the card ``block_table`` int64 ``(batch, blocks)`` and
            ``current_tkv_mask`` and ``left_padded_prompt_mask`` int64 ``(batch,)``; for the CPU
            what ``cpu.inputs`` describes.
        last_n_tokens: how many positions from the end get logits; 0: all.
    """

    embeds: torch.Tensor
    position_ids: torch.Tensor
    attention: Mapping[str, torch.Tensor]
    last_n_tokens: int


class SpyreModel:
    """An FMS model with its mapping, placed for one backend.

    Args:
        fms_model: as ``loader.load_model`` returns it; the linear layers of what runs on the host
            are replaced (:mod:`linear`).
        mapping: of its architecture.
        backend: what executes the decoder.
    """

    def __init__(self, fms_model: FmsModel, mapping: MMUtils, backend: Backend) -> None:
        self.fms_model = fms_model
        self.mapping = mapping
        self.backend = backend
        self.kv_cache: KVCache = []
        if backend == "sendnn":
            self.attn_name = CARD_ATTENTION
            import fms.utils.spyre.paged  # noqa: F401 - registers the algorithm
        else:
            self.attn_name = CPU_ATTENTION if backend == "eager" else CPU_COMPILED_ATTENTION
            register_cpu_attention()
        for part in self._encoder_parts():
            replace_linears(part, compiled=backend != "eager")
        if backend != "sendnn":
            replace_linears(fms_model, compiled=backend == "inductor")
        self._run: Any = fms_model

    def _encoder_parts(self) -> list[nn.Module]:
        parts = [
            getattr(self.fms_model, name) for name in self.mapping.load_overrides().encoder_modules
        ]
        return [part for part in parts if isinstance(part, nn.Module)]

    def compile(self) -> None:
        """Wrap what is to be compiled; each graph is made at its first run, in warmup."""
        overrides = self.mapping.load_overrides()
        if self.backend != "eager":
            compile_encoder_blocks(overrides.encoder_blocks(self.fms_model))
        if self.backend == "inductor":
            blocks = overrides.decoder_blocks(self.fms_model)
            replace_rotary(blocks)
            compile_decoder_blocks(blocks)
        elif self.backend == "sendnn":
            self._run = compile_for_card(self.fms_model)

    def warmup(self) -> AbstractContextManager[None]:
        """The context that graphs are made in."""
        if self.backend == "inductor":
            return cpu_compile_context(self._kernels())
        return warmup_context() if self.backend == "sendnn" else nullcontext()

    def _kernels(self) -> list[Callable[[], object]]:
        """What compiles the kernels of a step; there is a KV cache by now."""
        keys, _ = self.kv_cache[0]
        _, block_size, kv_heads, head_dim = keys.shape
        group = (
            self.mapping.text_config.num_attention_heads
            // self.mapping.kv_cache_options().num_kv_heads
        )
        vision = getattr(self.mapping.hf_config, "vision_config", None)
        tower = None if vision is None else vision.hidden_size // vision.num_attention_heads
        return kernel_registry.loaders(
            kernel_registry.ModelShape(keys.dtype, head_dim, kv_heads, group, block_size, tower)
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings ``(batch, length, hidden_size)`` of int64 ``(batch, length)``."""
        return self.mapping.embed_tokens(self.fms_model, token_ids)

    def encode(self, mm_kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Features of each image, ``(num_features, hidden_size)``, in the encoder's dtype."""
        return self.mapping.compute_features(self.fms_model, mm_kwargs)

    def forward(self, inputs: DecoderInputs) -> torch.Tensor:
        """Run the decoder and write to its KV cache.

        Returns:
            Logits of the last positions, ``(batch, last_n_tokens or length, vocab_size)``.
        """
        logits, kv_cache = self._run(
            inputs.embeds,
            position_ids=inputs.position_ids,
            past_key_value_states=self.kv_cache,
            use_cache=True,
            last_n_tokens=inputs.last_n_tokens,
            attn_name=self.attn_name,
            **inputs.attention,
        )
        if self.backend == "sendnn":
            # FMS's op for the card is functional; what it returns stands for the device's cache
            # and is never read on the host. The CPU's op wrote in place.
            self.kv_cache = kv_cache
        return logits
