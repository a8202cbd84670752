# SPDX-License-Identifier: Apache-2.0
"""Registers the platform's renderer.

Leans on: an engine takes its renderer from ``RENDERER_REGISTRY``, by the kind of its tokenizer.
"""

from types import ModuleType

from vllm_spyre_mm.upstream.contract import require, require_attributes
from vllm_spyre_mm.upstream.module_loading import when_loaded

MODE = "hf"
"""vLLM's name of tokenizers of Hugging Face."""

VLLMS = ("vllm.renderers.hf", "HfRenderer")
OURS = ("vllm_spyre_mm.frontend.renderer", "ImageRenderer")


def install() -> None:
    """Register it as soon as the registry exists; it is imported when an engine takes it."""
    when_loaded("vllm.renderers.registry", _register_renderer)


def _register_renderer(module: ModuleType) -> None:
    require_attributes(module, ("RENDERER_REGISTRY",))
    renderers = module.RENDERER_REGISTRY.renderers
    registered = renderers.get(MODE)
    require(registered in (VLLMS, OURS), f"the renderer {MODE!r} is {registered}")
    renderers[MODE] = OURS  # register() would warn of what is meant
