# SPDX-License-Identifier: Apache-2.0
"""Registers the platform's processor of images and videos.

For the class of the model that is served a processor is registered once more: vLLM's own, and its
processing information, with the platform's classes in front of theirs.

Leans on: the class of a model has its factories as ``_processor_factory``.
"""

import functools
from typing import TYPE_CHECKING, Any

from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo

from vllm_spyre_mm.frontend.image_processor import ImageProcessingInfo, ImageProcessor
from vllm_spyre_mm.frontend.tile_grids import TileGrids, makes_grids
from vllm_spyre_mm.upstream.contract import require_attributes, require_methods
from vllm_spyre_mm.upstream.marks import is_extended, mark

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def register_image_processor(model_config: "ModelConfig") -> None:
    """Register a processor of the platform's for the class of a model; repeatable.

    Args:
        model_config: of a model that takes images.

    Raises:
        UnsupportedVllmError: vLLM's classes are not as expected.
    """
    from vllm.model_executor.model_loader import get_model_cls

    check_bases()
    register_processor_of(get_model_cls(model_config))


def check_bases(info: type = BaseProcessingInfo, processor: type = BaseMultiModalProcessor) -> None:
    """Check that vLLM's bases have the methods that the platform's classes override.

    Raises:
        UnsupportedVllmError: one is missing, or its parameters have other names.
    """
    require_methods(info, {"parse_mm_data": ("mm_data", "validate"), "validate_num_items": ()})
    require_methods(
        processor,
        {
            "apply": ("inputs", "timing_ctx"),
            "get_dummy_inputs": (),
            "_cached_apply_hf_processor": ("inputs", "timing_ctx"),
            "_matched_updates_from_result": ("mm_prompt_updates", "match_result"),
            "_recompute_cached_prompt_update": ("cached_update", "new_item_idx"),
            "_postprocess_hf_mm_data": ("hf_processor_mm_kwargs", "processed_data"),
            "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        },
    )


def register_processor_of(model_cls: Any) -> None:
    """Register the platform's processor for a class of vLLM's that has one of vLLM's.

    Raises:
        UnsupportedVllmError: it has none.
    """
    require_attributes(model_cls, ("_processor_factory",))
    factories = model_cls._processor_factory
    require_attributes(factories, ("info", "processor", "dummy_inputs"))
    if is_extended(factories.processor, __name__):
        return

    def info(ctx: Any) -> Any:
        return _with_mixin(factories.info(ctx), ImageProcessingInfo)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        made = factories.processor(info, dummy_inputs)
        if makes_grids(made):
            require_attributes(made.info, ("_get_image_feature_grid_size",))
            made = _with_mixin(made, TileGrids)
        return _with_mixin(made, ImageProcessor)

    if "_processor_factory" in vars(model_cls):
        del model_cls._processor_factory  # of one that is there vLLM warns, and this is meant
    MULTIMODAL_REGISTRY.register_processor(
        mark(processor, __name__), info=info, dummy_inputs=factories.dummy_inputs
    )(model_cls)


def _with_mixin(instance: Any, mixin: type) -> Any:
    """An object of vLLM's whose methods are looked up in ``mixin`` first."""
    cls: Any = type(instance)
    instance.__class__ = _combined(mixin, cls)
    return instance


@functools.cache  # vLLM makes a processor for each chat
def _combined(mixin: type, cls: Any) -> type:
    return type(cls)(cls.__name__, (mixin, cls), {"__module__": __name__})
