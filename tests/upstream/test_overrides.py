# SPDX-License-Identifier: Apache-2.0
"""What is overridden of vLLM's classes is called as vLLM calls its own.

Found here by ``make upstream`` before a user finds it.
"""

import inspect
from collections.abc import Callable, Iterator

import pytest

from vllm_spyre_mm.frontend.image_processor import ImageProcessingInfo, ImageProcessor
from vllm_spyre_mm.frontend.mixed_images import MixedItems
from vllm_spyre_mm.frontend.renderer import ImageRenderer
from vllm_spyre_mm.frontend.tile_grids import TileGrids
from vllm_spyre_mm.platform import SpyrePlatform
from vllm_spyre_mm.scheduler.request_queue import AlternatingQueue
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler
from vllm_spyre_mm.vllm_fixes.media_connector import (
    CheckedEmbeddingMediaIO,
    CheckedImageMediaIO,
    CheckedMediaConnector,
)
from vllm_spyre_mm.vllm_fixes.sender_cache import SenderCache
from vllm_spyre_mm.vllm_fixes.video_media import CheckedVideoMediaIO
from vllm_spyre_mm.worker.sampler import HostSampler
from vllm_spyre_mm.worker.worker import SpyreWorker

SUBCLASSES = (
    CheckedEmbeddingMediaIO,
    CheckedImageMediaIO,
    CheckedMediaConnector,
    CheckedVideoMediaIO,
    HostSampler,
    ImageProcessingInfo,
    ImageProcessor,
    ImageRenderer,
    MixedItems,
    SenderCache,
    SpyrePlatform,
    SpyreScheduler,
    SpyreWorker,
    TileGrids,
    AlternatingQueue,
)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def overrides() -> Iterator[tuple[type, str]]:
    """Methods of the subclasses that vLLM's class has too, unless they hand on whatever comes."""
    for cls in SUBCLASSES:
        inherited = set(dir(cls.__mro__[1])) - set(dir(object))
        for name, member in vars(cls).items():
            function = getattr(member, "__func__", member)
            if name in inherited and callable(function) and not hands_on(function):
                yield cls, name


def hands_on(function: Callable[..., object]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind in VARIADIC for parameter in parameters)


def test_there_are_overrides_of_each_class() -> None:
    assert {cls for cls, _ in overrides()} == set(SUBCLASSES)


@pytest.mark.parametrize(
    ("cls", "name"),
    [pytest.param(*each, id=f"{each[0].__name__}.{each[1]}") for each in overrides()],
)
def test_an_override_takes_what_the_base_takes(cls: type, name: str) -> None:
    own = inspect.signature(getattr(cls, name)).parameters
    base = inspect.signature(getattr(cls.__mro__[1], name)).parameters
    assert list(own)[: len(base)] == list(base)
