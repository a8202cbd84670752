# SPDX-License-Identifier: Apache-2.0
"""The mappings, and the choice of the one that serves a model configuration.

Adding an architecture: one new file beside this one, and one line in :data:`MAPPINGS`.
"""

from typing import Any

from vllm_spyre_mm.multimodal.mm_mappings.base import MMUtils, UnsupportedModelError
from vllm_spyre_mm.multimodal.mm_mappings.granite4_vision import Granite4Vision
from vllm_spyre_mm.multimodal.mm_mappings.granite_vision import GraniteVision
from vllm_spyre_mm.multimodal.mm_mappings.idefics3 import Idefics3
from vllm_spyre_mm.multimodal.mm_mappings.llava import Llava
from vllm_spyre_mm.multimodal.mm_mappings.llava_next import LlavaNext
from vllm_spyre_mm.multimodal.mm_mappings.llava_onevision import LlavaOnevision
from vllm_spyre_mm.multimodal.mm_mappings.mistral3 import Mistral3
from vllm_spyre_mm.multimodal.mm_mappings.not_yet_architectures import why_not_yet
from vllm_spyre_mm.multimodal.mm_mappings.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from vllm_spyre_mm.multimodal.mm_mappings.text import TextDecoder

__all__ = [
    "MAPPINGS",
    "MM_CFG_MAPPING",
    "MMUtils",
    "UnsupportedModelError",
    "get_mm_mapping",
]

MAPPINGS: tuple[type[MMUtils], ...] = (
    GraniteVision,
    Granite4Vision,
    LlavaNext,
    LlavaOnevision,
    Llava,
    Mistral3,
    Idefics3,
    Qwen3VL,
    Qwen25VL,
    Qwen2VL,
    TextDecoder,
)

MM_CFG_MAPPING: dict[str, tuple[type[MMUtils], ...]] = {
    name: tuple(mapping for mapping in MAPPINGS if name in mapping.config_classes)
    for name in sorted({name for mapping in MAPPINGS for name in mapping.config_classes})
}
"""Candidates for each configuration class of Transformers and of FMS, by ``library.ClassName``.

Several architectures may share one configuration class; each candidate's predicate
(:meth:`MMUtils.why_not`) decides.
"""


def config_name(config: Any) -> str:
    """``library.ClassName`` of a Transformers or FMS configuration: the key of the mapping."""
    cls = type(config)
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def get_mm_mapping(config: Any) -> MMUtils:
    """The utils for a model configuration.

    Args:
        config: a Transformers configuration of a whole model.

    Raises:
        UnsupportedModelError: no mapping serves this model; says why, and what is served.
    """
    name = config_name(config)
    candidates = MM_CFG_MAPPING.get(name, ())
    if candidates and not name.startswith("transformers."):
        raise UnsupportedModelError(
            f"{name} describes the FMS model that is built, not all that a checkpoint says: give "
            "the Transformers configuration"
        )
    reasons = []
    for mapping in candidates:
        reason = _quantisation(config) or mapping.why_not(config)
        if reason is None:
            return mapping(config)
        reasons.append(f"{mapping.__name__}: {reason}")
    model_type = getattr(config, "model_type", name)
    not_yet = why_not_yet(config)
    if not_yet is not None:
        reasons.append(f"not yet: {not_yet}")
    supported = "; ".join(f"{mapping.__name__} ({mapping.summary})" for mapping in MAPPINGS)
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported on Spyre as configured{why}. "
        f"Supported: {supported}."
    )


def _quantisation(config: Any) -> str | None:
    """Why a quantised checkpoint is not served, or None: FMS alone has only plain linear layers."""
    for part in (config, config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization is not None:
            given = quantization if isinstance(quantization, dict) else quantization.to_dict()
            return f"quantization_config is {given.get('quant_method')!r}: no quantised weights"
    return None
