# SPDX-License-Identifier: Apache-2.0
"""The connector alone, as vLLM's scheduler and worker call it; engines with it are in
tests/e2e/test_feature_folder.py."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tests.worker.test_encoding import image
from vllm_spyre_mm.multimodal.feature_store import TooLargeError
from vllm_spyre_mm.scheduler.folder_connector import FolderConnector, FolderSettings

MODULE = FolderConnector.__module__
ROWS = torch.ones(3, 4)


def test_settings_are_taken() -> None:
    assert FolderSettings.parse({"folder": "here", "max_bytes": 5}) == FolderSettings(
        folder=Path("here"), max_bytes=5
    )
    assert FolderSettings.parse({"folder": "here"}).max_bytes == 10 << 30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "folder: Field required"),
        ({"folder": "here", "max_bytes": 0}, "max_bytes: Input should be greater than 0"),
        ({"folder": "here", "path": "there"}, "path: Extra inputs are not permitted"),
    ],
)
def test_settings_that_are_none_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FolderSettings.parse(given)


class Sides:
    """A connector as the scheduler and the worker of one engine have it."""

    def __init__(self, checkpoint: Path, folder: Path, role: Any, max_bytes: int) -> None:
        transfer = ECTransferConfig(
            ec_connector=FolderConnector.__name__,
            ec_connector_module_path=MODULE,
            ec_role=role,
            ec_connector_extra_config={"folder": str(folder), "max_bytes": max_bytes},
        )
        config = EngineArgs(
            model=str(checkpoint), load_format="dummy", ec_transfer_config=transfer
        ).create_engine_config()
        self.scheduler, self.worker = (FolderConnector(config, each) for each in ECConnectorRole)

    def step(self, cache: dict[str, torch.Tensor], *admitted: MultiModalFeatureSpec) -> None:
        """A step that admits a request, up to its encoding."""
        request: Any = SimpleNamespace(mm_features=list(admitted))
        for index, feature in enumerate(admitted):
            if feature.identifier not in cache:
                self.scheduler.update_state_after_alloc(request, index)
        output: Any = SimpleNamespace(scheduled_new_reqs=[request])
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        if self.worker.is_producer:
            self.worker.start_save_caches(encoder_cache=cache)
        if self.worker.is_consumer:
            self.worker.start_load_caches(cache)

    def save(self, cache: dict[str, torch.Tensor], *features: MultiModalFeatureSpec) -> None:
        for feature in features:
            cache[feature.identifier] = ROWS
            self.worker.save_caches(cache, feature.identifier)


@pytest.fixture
def sides(llava_next_checkpoint: Path, tmp_path: Path) -> Callable[..., Sides]:
    def make(role: str, max_bytes: int = 1 << 20) -> Sides:
        return Sides(llava_next_checkpoint, tmp_path, role, max_bytes)

    return make


@pytest.mark.parametrize("role", ["ec_producer", "ec_both"])
def test_what_has_gone_from_the_folder_is_kept_again(
    sides: Callable[..., Sides], role: str, tmp_path: Path
) -> None:
    """A producer that is asked again does not encode again, and others look into the folder."""
    made, cache, picture = sides(role), dict[str, torch.Tensor](), image(3)
    made.step(cache, picture)
    made.save(cache, picture)
    (file,) = tmp_path.iterdir()
    file.unlink()
    made.step(cache, image(9))
    assert not list(tmp_path.iterdir()), "nobody has asked for it"
    made.step(cache, picture)
    assert list(tmp_path.iterdir()) == [file]
    written = file.stat()
    made.step(cache, picture)
    assert file.stat().st_ino == written.st_ino, "it was there"


def test_a_consumer_keeps_nothing(sides: Callable[..., Sides], tmp_path: Path) -> None:
    sides("ec_consumer").step({"of 3": ROWS}, image(3))
    assert not list(tmp_path.iterdir())


def test_features_that_a_client_gave_are_not_kept(
    sides: Callable[..., Sides], tmp_path: Path
) -> None:
    sides("ec_both").step({"of 3": ROWS}, image(3, "image_embeds"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["ec_producer", "ec_consumer", "ec_both"])
def test_each_role_reads_what_is_there(sides: Callable[..., Sides], role: str) -> None:
    sides("ec_producer").scheduler.store.write("of 3", ROWS)
    cache: dict[str, torch.Tensor] = {}
    sides(role).step(cache, image(3))
    assert torch.equal(cache["of 3"], ROWS)


def test_a_producers_answer_names_its_pictures(sides: Callable[..., Sides]) -> None:
    request: Any = SimpleNamespace(mm_features=[image(3), image(5), image(3)])
    for role in ("ec_producer", "ec_both"):
        waits, named = sides(role).scheduler.request_finished(request)
        assert named is not None
        assert not waits
        assert {name: each["item_indices"] for name, each in named.items()} == {
            "of 3": [0, 2],
            "of 5": [1],
        }
    assert sides("ec_consumer").scheduler.request_finished(request) == (False, None)


def test_a_folder_that_is_too_small_fails_a_producers_request_alone(
    sides: Callable[..., Sides], caplog: pytest.LogCaptureFixture
) -> None:
    cache: dict[str, torch.Tensor] = {}
    both, producer = sides("ec_both", 20), sides("ec_producer", 20)
    for made in (both, producer):
        made.step(cache)
    for _ in range(2):
        both.save(cache, image(3))
    assert caplog.text.count("features are not kept for a restart: the features of a picture") == 1
    with pytest.raises(TooLargeError):
        producer.save(cache, image(3))
    with pytest.raises(TooLargeError):
        producer.step(cache, image(3))
