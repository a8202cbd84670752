# SPDX-License-Identifier: Apache-2.0
"""A kept reference is found by what made it, and by nothing else; a run says what it covered."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import pytest_terminal_summary
from tests.kept import Kept, digest, digest_of_files, digest_of_images


def test_a_value_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(len(made))
        return torch.full((2, 3), float(len(made)))

    folder = tmp_path / "kept"
    first = Kept(folder, "checkpoint").get(("prompt", "8"), make)
    again = Kept(folder, "checkpoint").get(("prompt", "8"), make)
    assert torch.equal(first, again)
    assert made == [0]
    for made_of, key in (("another", ("prompt", "8")), ("checkpoint", ("prompt8", ""))):
        assert not torch.equal(Kept(folder, made_of).get(key, make), first)
    assert made == [0, 1, 2]
    assert len(list(folder.iterdir())) == 3


def test_parts_have_boundaries() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab") != digest("ab", "")


def test_pictures_differ_by_pixels_mode_size_and_palette() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    other_palette = image.copy()
    other_palette.putpalette([0, 0, 0, 0, 255, 0])
    see_through = image.copy()
    see_through.info["transparency"] = 1
    images = [
        image,
        other_palette,
        see_through,
        Image.new("P", (4, 2), 0),
        Image.new("L", (4, 2), 1),
        Image.new("L", (2, 4), 1),
    ]
    digests = [digest_of_images([each]) for each in images]
    assert len(set(digests)) == len(images)
    assert digest_of_images([image.copy()]) == digests[0]
    assert digest_of_images([images[4], images[5]]) != digest_of_images([images[5], images[4]])


def test_a_checkpoint_is_its_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    before = digest_of_files(tmp_path)
    assert digest_of_files(tmp_path) == before
    file.write_text("{ }")
    assert digest_of_files(tmp_path) != before


def test_the_summary_names_what_passing_tests_covered(
    covers: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    covers("one tier")
    properties = request.node.user_properties
    report = SimpleNamespace(user_properties=list(properties))
    properties.clear()  # this run's own summary has nothing of it
    failed = SimpleNamespace(user_properties=[("covers", "another tier")])
    lines: list[str] = []
    reporter: Any = SimpleNamespace(
        stats={"passed": [report, report], "failed": [failed]},
        write_sep=lambda _, line: lines.append(line),
    )
    pytest_terminal_summary(reporter)
    assert lines == ["covered: one tier"]
