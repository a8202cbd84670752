# SPDX-License-Identifier: Apache-2.0
"""The decoder on the card, through ``torch_sendnn``; the vision encoder stays on the host."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm_spyre_mm.config import CardSettings
from vllm_spyre_mm.environment import export_card_environment
from vllm_spyre_mm.model_executor.backend import Backend, StepSizes, WarmupPass, WarmupWork
from vllm_spyre_mm.model_executor.card.compile import CardDecoder, keep_signal_handlers
from vllm_spyre_mm.model_executor.card.inputs import CardInputs
from vllm_spyre_mm.model_executor.cpu.encoder import compile_encoder, place_encoder
from vllm_spyre_mm.model_executor.kv_cache import KVCache
from vllm_spyre_mm.model_executor.models.mrope import step_rope_of
from vllm_spyre_mm.model_executor.spec import FmsModel, LoadOverrides, ModelSpec
from vllm_spyre_mm.model_executor.step_inputs import DecoderInputs

CARD_ATTENTION = "spyre_paged_attn"
"""FMS's name of its attention algorithm for the card."""


class CardBackend(Backend):
    """Runs the decoder through the card's compiler.

    Args:
        sizes: of the steps.
        settings: what is unknown of the card's compiler.
    """

    for_card = True

    def __init__(self, sizes: StepSizes, settings: CardSettings) -> None:
        self.sizes = sizes
        self.settings = settings
        self._run: Any = None

    def without_gradients(self) -> AbstractContextManager[None]:
        """The card's compiler takes no tensor of ``inference_mode``."""
        return torch.no_grad()

    def prepare(self) -> None:
        """Set what the card's compiler reads when it is imported."""
        export_card_environment(
            chunk_size=self.sizes.chunk_size,
            context_len=self.sizes.context_len,
            max_num_seqs=self.sizes.max_num_seqs,
            max_batch_tkv=max(self.sizes.max_batch_tkv, self.sizes.context_len),
        )

    def place(self, model: FmsModel, overrides: LoadOverrides) -> None:
        import fms.utils.spyre.paged  # noqa: F401 - registers the algorithm

        place_encoder(model, overrides, compiled=True)
        self.inputs = CardInputs(
            self.sizes.block_size,
            dynamic_chunk=self.settings.dynamic_chunk,
            num_levels=overrides.deepstack_levels,
        )
        if (rope := step_rope_of(overrides.decoder_blocks(model))) is not None:
            self.inputs.rotate = rope.rotations
        self._run = model

    def compile(self, model: FmsModel, overrides: LoadOverrides) -> None:
        compile_encoder(model, overrides)
        self._run = CardDecoder(model, fullgraph=self.settings.fullgraph)

    def warmup_passes(self, spec: ModelSpec, kv_cache: KVCache) -> Iterator[WarmupPass]:
        # Nothing but the decoder is compiled in the card's context, and nothing of the host's once
        # the card is in use.
        yield WarmupPass("Compiling the encoder", WarmupWork.ENCODER, nullcontext())
        assert isinstance(self._run, CardDecoder), "compile comes first"
        yield WarmupPass("Compiling", WarmupWork.GRAPHS, self._run.compiling())
        # What was compiled is deployed by a run outside of that context.
        yield WarmupPass("Deploying", WarmupWork.GRAPHS, keep_signal_handlers())
        yield WarmupPass("Warming up", WarmupWork.REQUESTS, nullcontext())

    def forward(self, inputs: DecoderInputs, kv_cache: KVCache) -> tuple[torch.Tensor, KVCache]:
        # FMS's attention for the card is functional: the cache that it returns is of ghost tensors,
        # which stand for the device's memory and are never read on the host.
        return self._run(
            inputs.embeds,
            position_ids=inputs.position_ids,
            past_key_value_states=kv_cache,
            use_cache=True,
            last_n_tokens=inputs.last_n_tokens,
            deepstack=inputs.deepstack,
            attn_name=CARD_ATTENTION,
            **inputs.attention,
        )
