# SPDX-License-Identifier: Apache-2.0
"""What the front end leaves out, held against what the engine's own cache was given."""

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.cache.base import MultiModalCacheMissError
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.upstream.marks import is_extended
from vllm_spyre_mm.vllm_fixes import sender_cache
from vllm_spyre_mm.vllm_fixes.sender_cache import SenderCache, note_admission

GIB = 1 << 30
UPDATES: Any = ["updates"]


def model_config(capacity: int = 1 << 20) -> Any:
    multimodal = SimpleNamespace(mm_processor_cache_gb=capacity / GIB)
    return SimpleNamespace(get_multimodal_config=lambda: multimodal)


class Ends:
    """The front end's cache and the engine's, as vLLM joins them."""

    def __init__(self, sender: type = SenderCache, capacity: int = 1 << 20) -> None:
        self.sender = sender(model_config(capacity))
        self.receiver = LruKeyReplicatedReceiverCache(model_config(capacity))

    def render(self, name: str, size: int = 8) -> MultiModalKwargsItem | None:
        """What a request carries of a picture, which is processed where it is not cached."""
        cached = self.sender.is_cached_item(name)
        item = None if cached else (MultiModalKwargsItem.dummy(size), UPDATES)
        carried, updates = self.sender.get_and_update_item(item, name)
        assert updates == UPDATES
        return carried

    def submit(self, name: str, carried: MultiModalKwargsItem | None) -> MultiModalKwargsItem:
        """What the engine computes with once it has accepted the request."""
        place = PlaceholderRange(0, 1)
        feature = MultiModalFeatureSpec(carried, "image", name, place, mm_hash=name)
        note_admission(SimpleNamespace(mm_features=[feature]))
        (received,) = self.receiver.get_and_update_features([feature])
        return received.data


def test_vllms_own_cache_leaves_out_what_the_engine_never_got():
    """The fault that is mended; if this fails, vLLM has mended it and the hook can go."""
    ends = Ends(LruKeyReplicatedSenderCache)
    ends.render("picture")  # and refused
    with pytest.raises(MultiModalCacheMissError):
        ends.submit("picture", ends.render("picture"))


def test_a_picture_of_a_refused_request_is_sent_with_the_next_one():
    ends = Ends()
    first = ends.render("picture")
    second = ends.render("picture")
    assert second is first  # and is not processed again
    assert ends.submit("picture", second) is first


def test_an_accepted_picture_is_sent_once():
    ends = Ends()
    item = ends.submit("picture", ends.render("picture"))
    assert ends.render("picture") is None
    assert ends.submit("picture", None) is item


def test_a_refusal_takes_nothing_from_a_request_beside_it():
    """Both were processed before either was checked, in either order."""
    ends = Ends()
    refused, accepted = ends.render("picture"), ends.render("picture")
    assert ends.submit("picture", accepted) is refused


def test_an_accepted_picture_is_held_by_the_engine_alone():
    ends = Ends()
    ends.submit("picture", ends.render("picture"))
    assert ends.sender._cache.cache["picture"].unsent is None


def test_a_request_that_carries_nothing_changes_nothing():
    ends = Ends()
    ends.render("picture")
    note_admission(SimpleNamespace(mm_features=None))
    note_admission(
        SimpleNamespace(
            mm_features=[MultiModalFeatureSpec(None, "image", "picture", PlaceholderRange(0, 1))]
        )
    )
    assert ends.render("picture") is not None


def test_what_the_engine_lost_is_sent_again():
    ends = Ends()
    ends.submit("picture", ends.render("picture"))
    ends.receiver.clear_cache()
    with pytest.raises(MultiModalCacheMissError) as miss:
        ends.submit("picture", ends.render("picture"))
    for name in miss.value.mm_hashes:  # as vLLM does it
        ends.sender.invalidate(name)
    assert ends.submit("picture", ends.render("picture")) is not None


def test_both_caches_evict_the_same():
    """Bounded by the size of the items, whoever holds them."""
    ends = Ends(capacity=100)
    for name in "abc":
        ends.submit(name, ends.render(name, size=40))
    assert [ends.sender.is_cached_item(name) for name in "abc"] == [False, True, True]
    assert ends.submit("b", ends.render("b", size=40)) is not None


def test_an_item_beyond_the_caches_size_is_always_sent():
    ends = Ends(capacity=100)
    for _ in range(2):
        assert ends.submit("picture", ends.render("picture", size=200)) is not None


class Admitting:
    """vLLM's output processor as far as requests are given to it; may have no place for one."""

    def __init__(self) -> None:
        self.full = False

    def add_request(self, request: Any, prompt: Any, index: int = 0) -> None:
        if self.full:
            raise RuntimeError("the queue is full")


def output_processor() -> Any:
    """One that is extended."""

    class Processor(Admitting):
        def add_request(self, request: Any, prompt: Any, index: int = 0) -> None:
            super().add_request(request, prompt, index)

    module = ModuleType("processors")
    module.OutputProcessor = Processor
    for _ in range(2):  # the second time is harmless
        sender_cache._extend_output_processor(module)
    return Processor()


def test_a_picture_is_sent_when_its_request_is_admitted():
    ends = Ends()
    processor = output_processor()
    item = ends.render("picture")
    feature = MultiModalFeatureSpec(item, "image", "picture", PlaceholderRange(0, 1))
    request = SimpleNamespace(mm_features=[feature])
    processor.full = True
    with pytest.raises(RuntimeError, match="full"):
        processor.add_request(request, None)
    assert ends.render("picture") is item
    processor.full = False
    processor.add_request(request, None, index=1)
    assert ends.render("picture") is None


def test_pictures_that_other_caches_hold_are_left_alone():
    feature = MultiModalFeatureSpec(
        MultiModalKwargsItem.dummy(8), "image", "picture", PlaceholderRange(0, 1)
    )
    output_processor().add_request(SimpleNamespace(mm_features=[feature]), None)
    output_processor().add_request(SimpleNamespace(mm_features=None), None)


def test_every_request_that_is_admitted_is_noted():
    sender_cache.install()
    assert is_extended(OutputProcessor.add_request, sender_cache.__name__)
    # Nothing is awaited between the admission and the hand-over, so that no other task renders.
    source = inspect.getsource(AsyncLLM._add_request)
    admitted, handed_over = source.index(".add_request("), source.index(".add_request_async(")
    assert source[admitted:handed_over].count("await") == 1


def test_a_module_that_is_not_as_expected_is_refused_before_it_is_changed():
    module = ModuleType("vllm.v1.engine.output_processor")
    with pytest.raises(UnsupportedVllmError, match="no 'OutputProcessor'"):
        sender_cache._extend_output_processor(module)
    module.OutputProcessor = type("OutputProcessor", (), {"add_request": lambda self: None})
    with pytest.raises(UnsupportedVllmError, match="no parameter 'request'"):
        sender_cache._extend_output_processor(module)
