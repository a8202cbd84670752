# SPDX-License-Identifier: Apache-2.0
"""The decoder on the CPU: compiled by Inductor, block by block, or eager."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm_spyre_mm.model_executor.backend import Backend, StepSizes, WarmupPass, WarmupWork
from vllm_spyre_mm.model_executor.cpu.attention import (
    CPU_ATTENTION,
    CPU_COMPILED_ATTENTION,
    register_cpu_attention,
)
from vllm_spyre_mm.model_executor.cpu.compile import (
    compile_decoder_blocks,
    cpu_compile_context,
    prepare_cpu_compiler,
)
from vllm_spyre_mm.model_executor.cpu.encoder import compile_encoder, place_encoder
from vllm_spyre_mm.model_executor.cpu.inputs import CpuInputs
from vllm_spyre_mm.model_executor.cpu.kernels.registry import ModelShape, loaders
from vllm_spyre_mm.model_executor.cpu.kernels.rope import replace_rope, takes_columns
from vllm_spyre_mm.model_executor.cpu.linear import replace_linears
from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.model_executor.models.mrope import step_rope_of
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs


class CpuBackend(Backend):
    """Runs the decoder on the host.

    Args:
        sizes: of the steps.
        compiled: compile with Inductor and use the C++ kernels; else run PyTorch's operators.
    """

    for_card = False

    def __init__(self, sizes: StepSizes, *, compiled: bool) -> None:
        self.compiled = compiled
        self.inputs = CpuInputs(
            max_num_seqs=sizes.max_num_seqs,
            max_blocks=sizes.max_blocks,
            block_size=sizes.block_size,
            least_tokens=2 if compiled else 1,
        )
        self._attn_name = CPU_COMPILED_ATTENTION if compiled else CPU_ATTENTION
        self._run: Any = None

    def without_gradients(self) -> AbstractContextManager[None]:
        return torch.inference_mode()

    def prepare(self) -> None:
        """Start the compiler's one-time preparation in the background."""
        if self.compiled:
            prepare_cpu_compiler()

    def place(self, model: FmsModel, overrides: LoadOverrides) -> None:
        register_cpu_attention()
        place_encoder(model, overrides, compiled=self.compiled)
        replace_linears(model, compiled=self.compiled)
        if (rope := step_rope_of(overrides.decoder_blocks(model))) is not None:
            kernel = self.compiled and takes_columns(rope)
            self.inputs.rotate = rope.columns if kernel else rope.rotations
        self._run = model

    def compile(self, model: FmsModel, overrides: LoadOverrides) -> None:
        if self.compiled:
            compile_encoder(model, overrides)
            blocks = overrides.decoder_blocks(model)
            replace_rope(blocks)
            compile_decoder_blocks(blocks)

    def warmup_passes(self, spec: ModelSpec, kv_cache: KVCache) -> Iterator[WarmupPass]:
        if not kv_cache:
            context = cpu_compile_context() if self.compiled else nullcontext()
            yield WarmupPass("Warming up the encoder", WarmupWork.ENCODER, context)
        elif self.compiled:
            context = cpu_compile_context(loaders(_shape(spec, kv_cache)))
            yield WarmupPass("Compiling", WarmupWork.REQUESTS, context)
        else:
            yield WarmupPass("Warming up", WarmupWork.REQUESTS, nullcontext())

    def forward(self, inputs: DecoderInputs, kv_cache: KVCache) -> tuple[torch.Tensor, KVCache]:
        logits, _ = self._run(
            inputs.embeds,
            position_ids=inputs.position_ids,
            past_key_value_states=kv_cache,
            use_cache=True,
            last_n_tokens=inputs.last_n_tokens,
            deepstack=inputs.deepstack,
            attn_name=self._attn_name,
            **inputs.attention,
        )
        return logits, kv_cache  # attention writes to it in place


def _shape(spec: ModelSpec, kv_cache: KVCache) -> ModelShape:
    """The sizes that kernels are compiled for."""
    keys, _ = kv_cache[0]
    _, block_size, kv_heads, head_dim = keys.shape
    group = spec.text_config.num_attention_heads // spec.kv_cache_options().num_kv_heads
    return ModelShape(keys.dtype, head_dim, kv_heads, group, block_size, spec.encoder_head_dim)
