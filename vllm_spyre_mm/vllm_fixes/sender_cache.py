# SPDX-License-Identifier: Apache-2.0
"""Sends a processed picture to the engine until a request has taken it there.

Leans on: ``processor_cache_from_config`` makes the front end's cache by the name
``LruKeyReplicatedSenderCache`` of ``vllm.multimodal.cache.factories`` where the engine mirrors it;
an entry of it is a ``MultiModalProcessorCacheItemMetadata``, and its other kinds of cache hold the
picture themselves, so that they need nothing. ``AsyncLLM`` and ``LLMEngine`` have that cache in
their ``renderer``, and give every request that was admitted to ``OutputProcessor.add_request``, and
then to the engine, without waiting for anything in between.

vLLM's front end takes a picture that it has processed once for one that the engine holds, and
sends later requests without it. If the first request is refused after that (its parameters, its
length, a full queue), the engine never gets the picture, and the next request that shows it fails
with HTTP 500, whoever sent it. vLLM recovers then, but not before.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm.multimodal.cache.base import (
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheItemMetadata,
    MultiModalProcessorCacheOutItem,
)
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_spyre_mm.upstream.contract import require, require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

if TYPE_CHECKING:
    from vllm.multimodal.processing.processor import ResolvedPromptUpdate
    from vllm.v1.engine import EngineCoreRequest

NAME = "LruKeyReplicatedSenderCache"
ATTRIBUTE = "mm_sender_cache"
"""Of an output processor: the cache whose pictures the requests carry that it is given."""


class SenderCacheEntry(MultiModalProcessorCacheItemMetadata):
    """What vLLM remembers of a processed item, and the item while the engine does not have it.

    Attributes:
        unsent: the processed item until a request that carries it is accepted, then None.
    """

    def __init__(
        self, item: MultiModalKwargsItem, prompt_updates: "Sequence[ResolvedPromptUpdate]"
    ) -> None:
        super().__init__(item, prompt_updates)
        self.unsent: MultiModalKwargsItem | None = item


class SenderCache(LruKeyReplicatedSenderCache):
    """vLLM's cache of the front end; it leaves out only items that the engine was given."""

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        """The item as a request is to carry it (None where the engine has it), and its updates."""
        entry = self._cache.get(mm_hash)
        if entry is not None:
            assert isinstance(entry, SenderCacheEntry)
            return entry.unsent, entry.prompt_updates
        assert mm_item is not None, f"vLLM processes an item that is not cached: {mm_hash}"
        self.cache_if_fits(self._cache, mm_hash, SenderCacheEntry(*mm_item))
        return mm_item

    def accept(self, request: "EngineCoreRequest") -> None:
        """Take note that ``request``, which was admitted, carries its items to the engine."""
        entries = self._cache.cache  # a view: this is not a use of the entry
        for feature in request.mm_features or ():
            entry = entries.get(feature.mm_hash or feature.identifier)
            if feature.data is not None and isinstance(entry, SenderCacheEntry):
                entry.unsent = None


def install() -> None:
    """Let vLLM make this cache in place of its own as soon as it can make one."""
    when_loaded("vllm.multimodal.cache.factories", _replace_sender_cache)
    when_loaded("vllm.v1.engine.output_processor", _extend_output_processor)
    when_loaded("vllm.v1.engine.async_llm", functools.partial(_extend_engine, name="AsyncLLM"))
    when_loaded("vllm.v1.engine.llm_engine", functools.partial(_extend_engine, name="LLMEngine"))


def _replace_sender_cache(module: ModuleType) -> None:
    require_attributes(module, (NAME, "processor_cache_from_config"))
    if getattr(module, NAME) is SenderCache:
        return
    require(
        getattr(module, NAME) is LruKeyReplicatedSenderCache,
        f"{module.__name__}.{NAME} is another class",
    )
    require_parameters(LruKeyReplicatedSenderCache.get_and_update_item, ("mm_item", "mm_hash"))
    require_attributes(LruKeyReplicatedSenderCache, ("cache_if_fits", "invalidate"))
    setattr(module, NAME, SenderCache)


def _extend_output_processor(module: ModuleType) -> None:
    require_attributes(module, ("OutputProcessor",))
    processor = module.OutputProcessor
    original = processor.add_request
    if is_extended(original, __name__):
        return
    require_parameters(original, ("request",))

    @extending(original, __name__)
    def add_request(self: Any, request: "EngineCoreRequest", *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        if self.mm_sender_cache is not None:
            self.mm_sender_cache.accept(request)

    setattr(processor, ATTRIBUTE, None)
    processor.add_request = add_request


def _extend_engine(module: ModuleType, name: str) -> None:
    """Let an engine's output processor know the cache of its renderer."""
    require_attributes(module, (name,))
    engine = getattr(module, name)
    original = engine.__init__
    if is_extended(original, __name__):
        return

    @extending(original, __name__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        cache = self.renderer.mm_processor_cache
        if isinstance(cache, SenderCache):
            setattr(self.output_processor, ATTRIBUTE, cache)

    engine.__init__ = __init__
