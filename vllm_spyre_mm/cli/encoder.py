# SPDX-License-Identifier: Apache-2.0
"""The vision encoder by itself: a model without its decoder, and without an engine.

It is loaded, packed and compiled as in the worker, and gets its inputs from vLLM's processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.transformers_utils.processor import get_video_processor_cls_name

from vllm_spyre_mm.cli.media import Item, read_item
from vllm_spyre_mm.config import BackendName
from vllm_spyre_mm.frontend.processor_registration import register_image_processor
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.checkpoint import find_checkpoint
from vllm_spyre_mm.model_executor.cpu.encoder import compile_encoder, place_encoder
from vllm_spyre_mm.model_executor.cpu.memory import mmap_threshold
from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes
from vllm_spyre_mm.model_executor.cpu.torch_internals import why_not_compiled
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice
from vllm_spyre_mm.multimodal.feature_check import check_features, dtype_name
from vllm_spyre_mm.multimodal.mm_mappings import UnsupportedModelError, get_mm_mapping
from vllm_spyre_mm.multimodal.pooling import choose_levels, convert, pool

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalKwargsItem

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessedItem:
    """A picture or a video as the encoder takes it.

    Attributes:
        modality: vLLM's name, ``image`` or ``video``.
        item: what vLLM's processor makes of it.
        num_features: number of features that it would have in a prompt.
    """

    modality: str
    item: "MultiModalKwargsItem"
    num_features: int


class VisionEncoder:
    """Encodes pictures and videos on the host.

    Args:
        model: folder in the Hugging Face layout, or hub name.
        dtype: of the encoder; None for the host's fastest.
        backend: ``inductor`` compiles the tower's blocks at the first picture; ``eager`` does not.
        revision: of a hub model.

    Raises:
        UnsupportedModelError: the model has no vision encoder, or is not served.
        CheckpointError: the encoder's tensors are not complete.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype | None = None,
        backend: BackendName = "inductor",
        revision: str | None = None,
    ) -> None:
        self.dtype = dtype or host_dtypes()[0]
        arguments = EngineArgs(
            model=model,
            revision=revision,
            dtype=dtype_name(self.dtype),  # type: ignore[arg-type]  # also that of pixels
            # Else the processor of some models leaves pixels for vLLM's own tower to normalise.
            mm_device_do_normalize=False,
        )
        model_config = arguments.create_model_config()
        self.mapping = get_mm_mapping(model_config.hf_config)
        if self.mapping.image_token_id is None:
            raise UnsupportedModelError(f"{model} is a text model: it has no vision encoder")
        checkpoint = find_checkpoint(model_config, arguments.create_load_config())
        options = LoadOptions(self.dtype, self.dtype, part=ModelPart.ENCODER)
        with mmap_threshold():
            self.model = load_model(self.mapping, checkpoint, options)
            overrides = self.mapping.load_overrides()
            place_encoder(self.model, overrides, compiled=backend == "inductor")
        if backend == "inductor":
            if reason := why_not_compiled():
                logger.warning("%s: nothing is compiled for the CPU, and all takes longer", reason)
            compile_encoder(self.model, overrides)
        register_image_processor(model_config)
        self._processor = MULTIMODAL_REGISTRY.create_processor(model_config)
        self._video_loader = get_video_loader_backend_for_processor(
            get_video_processor_cls_name(model_config)
        )

    def read(self, path: Path) -> Item:
        """A picture, or a video if the model takes some, from a file; see :func:`read_item`."""
        return read_item(path, self.mapping.modalities, self._video_loader)

    def process(self, given: Item) -> ProcessedItem:
        """Process a picture or a video for :meth:`encode`; may run in another thread."""
        modality = "video" if isinstance(given, tuple) else "image"
        items = self._processor.info.parse_mm_data({modality: [given]}, validate=False)
        prompt = self._processor.dummy_inputs.get_dummy_text({modality: 1})
        processed = self._processor(prompt, items)
        item = processed["mm_kwargs"][modality][0]
        assert item is not None, "no cache is in between"
        (place,) = processed["mm_placeholders"][modality]
        return ProcessedItem(modality, item, place.get_num_embeds())

    @torch.inference_mode()
    def encode(self, items: Sequence[ProcessedItem], choice: EmbeddingChoice) -> list[torch.Tensor]:
        """Features of processed pictures and videos, pooled and converted.

        Returns:
            For each item ``(rows, columns)``, contiguous memory of its own.

        Raises:
            FeatureError: features of one of them cannot be used, by the worker's check.
            EmbeddingOverflowError: the chosen dtype cannot hold features of one of them.
        """
        kwargs: list[tuple[str, Any]] = [(each.modality, each.item) for each in items]
        features = [
            each
            for _, _, batch in group_and_batch_mm_kwargs(kwargs)
            for each in self.mapping.compute_features(self.model, batch)
        ]
        for item, each in zip(items, features, strict=True):
            check_features(each, item.num_features, self.mapping.feature_width)
        name = dtype_name(self.dtype) if choice.dtype == "auto" else choice.dtype
        rows = (
            pool(
                choose_levels(each, self.mapping.text_config.hidden_size, choice),
                self.mapping.feature_layout(item.item),
                choice,
            )
            for each, item in zip(features, items, strict=True)
        )
        return [convert(each, name)[0].contiguous() for each in rows]
