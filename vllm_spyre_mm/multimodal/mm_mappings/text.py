# SPDX-License-Identifier: Apache-2.0
"""Text models: any of the FMS decoders that compositions have, without a tower."""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_spyre_mm.model_executor.models.decoders import decoder_mismatch
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.model_executor.spec import FmsModel
from vllm_spyre_mm.multimodal.mm_mappings.decoder import DecoderMapping


class TextDecoder(DecoderMapping):
    """A decoder alone; like the others, it is given embeddings, not token ids."""

    config_classes = (
        "transformers.GraniteConfig",
        "transformers.LlamaConfig",
        "transformers.MistralConfig",
        "transformers.Ministral3Config",
        "transformers.Qwen2Config",
        "transformers.Qwen3Config",
        "transformers.GraniteMoeHybridConfig",
        "fms.GraniteConfig",
        "fms.LLaMAConfig",
        "fms.MistralConfig",
        "fms.Ministral3TextConfig",
        "fms.Qwen3Config",
    )
    summary = "text models: Granite, dense 4 too, Llama, Mistral, Ministral 3, Qwen 2 and 3"

    @classmethod
    def why_not(cls, hf_config: Any) -> str | None:
        return decoder_mismatch(hf_config, name="")

    @property
    def text_config(self) -> Any:
        return self.hf_config

    @property
    def image_token_id(self) -> None:
        return None

    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        return []

    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        assert not mm_kwargs, "vLLM takes no pictures for a text model"
        yield from ()
        return []

    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> None:
        return None
