# SPDX-License-Identifier: Apache-2.0
"""Pictures in a folder, a file to write to, and a tower that fails as it is told."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.embedding_runs import Tower
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.demo import pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = random.Random("embed")
    for i in range(7):
        size = (rng.randint(30, 260), rng.randint(30, 260))
        picture = pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng)
        picture.image.save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(params=["safetensors", "parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"features.{request.param}"


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> Tower:
    tower, original = Tower(), VisionEncoder.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        compute = self.mapping.compute_features
        self.mapping.compute_features = lambda *given: tower(compute(*given))

    monkeypatch.setattr(VisionEncoder, "__init__", __init__)
    return tower
