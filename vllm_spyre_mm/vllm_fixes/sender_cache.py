# SPDX-License-Identifier: Apache-2.0
"""Sends a processed picture to the engine until a request has taken it there.

:class:`SenderCache` takes the place of vLLM's cache in the platform's renderer
(``frontend.renderer``); vLLM's other kinds of cache hold the picture themselves, so that they need
nothing.

Leans on: an entry of ``LruKeyReplicatedSenderCache`` is a ``MultiModalProcessorCacheItemMetadata``;
the item that it returns is the object that the request carries; every request that was admitted is
given to ``OutputProcessor.add_request``, and then to the engine, without waiting for anything in
between.
"""

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

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

if TYPE_CHECKING:
    from vllm.multimodal.processing.processor import ResolvedPromptUpdate
    from vllm.v1.engine import EngineCoreRequest

FAULT = Fault(
    "vLLM's front end takes a picture that it has processed once for one that the engine holds. If "
    "its request is refused after that (its parameters, its length, a full queue), the engine "
    "never gets the picture, and the next request that shows it fails with HTTP 500, whoever sent "
    "it.",
    seen_in="0.32.0",
)
REPLACED = ("vllm.v1.engine.output_processor.OutputProcessor.add_request",)

ENTRY = "sender_cache_entry"
"""Of a processed item: the entry that holds it until a request that carries it is admitted."""


class SenderCacheEntry(MultiModalProcessorCacheItemMetadata):
    """What vLLM remembers of a processed item, and the item while the engine does not have it.

    Attributes:
        unsent: the processed item until a request that carries it is admitted, then None.
    """

    def __init__(
        self, item: MultiModalKwargsItem, prompt_updates: "Sequence[ResolvedPromptUpdate]"
    ) -> None:
        super().__init__(item, prompt_updates)
        self.unsent: MultiModalKwargsItem | None = item
        setattr(item, ENTRY, self)


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


def install() -> None:
    """Extend vLLM's output processor, which is told of every request that is admitted."""
    when_loaded("vllm.v1.engine.output_processor", _extend_output_processor)


def _extend_output_processor(module: ModuleType) -> None:
    require_attributes(module, ("OutputProcessor",))
    processor = module.OutputProcessor
    original = processor.add_request
    if is_extended(original, __name__):
        return
    require_parameters(original, ("request",))
    require_parameters(LruKeyReplicatedSenderCache.get_and_update_item, ("mm_item", "mm_hash"))
    require_attributes(LruKeyReplicatedSenderCache, ("cache_if_fits", "invalidate"))

    @extending(original, __name__)
    def add_request(self: Any, request: "EngineCoreRequest", *args: Any, **kwargs: Any) -> None:
        original(self, request, *args, **kwargs)
        note_admission(request)

    processor.add_request = add_request


def note_admission(request: "EngineCoreRequest") -> None:
    """Take note that ``request`` carries its items to the engine, so that no other need."""
    for feature in request.mm_features or ():
        entry = getattr(feature.data, ENTRY, None)
        if entry is not None:
            entry.unsent = None
            delattr(feature.data, ENTRY)  # an engine in this process may pickle the item
