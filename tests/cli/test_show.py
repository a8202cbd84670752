# SPDX-License-Identifier: Apache-2.0
"""A picture's features as a PNG."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_spyre_mm.cli import main
from vllm_spyre_mm.demo.pictures import Shape, draw_picture
from vllm_spyre_mm.multimodal.coloring import CAPTION_HEIGHT, PANEL_HEIGHT


def save(path: Path, place: str) -> Path:
    draw_picture([Shape("square", "red", place)], (144, 144)).image.save(path)
    return path


def test_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.png"
    assert main(["show", str(save(tmp_path / "a.png", "top left")), "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(output)
    drawn = Image.open(output)
    assert drawn.size == (3 * PANEL_HEIGHT, CAPTION_HEIGHT + PANEL_HEIGHT)


def test_the_place_of_a_shape_is_like_the_place_of_the_same_shape_elsewhere(
    tmp_path: Path,
) -> None:
    """The square's place in one picture against both: red where the square is in the other."""
    first = save(tmp_path / "a.png", "top left")
    second = save(tmp_path / "b.png", "bottom right")
    output = tmp_path / "out.png"
    arguments = ["show", str(first), str(second), "--place", "4", "4", "-o", str(output)]
    assert main(arguments) == 0
    drawn = np.asarray(Image.open(output).convert("RGB")).astype(int)
    height = CAPTION_HEIGHT + PANEL_HEIGHT
    assert drawn.shape[:2] == (2 * height, 2 * PANEL_HEIGHT)
    fine = drawn[height + CAPTION_HEIGHT :, PANEL_HEIGHT:]
    redness = fine[..., 0] - fine[..., 2]
    half = PANEL_HEIGHT // 2
    quarters = {
        "top left": redness[:half, :half].mean(),
        "top right": redness[:half, half:].mean(),
        "bottom left": redness[half:, :half].mean(),
        "bottom right": redness[half:, half:].mean(),
    }
    assert max(quarters, key=quarters.__getitem__) == "bottom right"


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    output = tmp_path / "out.png"
    assert main(["show", str(broken), "-o", str(output)]) == 1
    assert "the picture cannot be read: Failed to load image" in capsys.readouterr().err
    good = str(save(tmp_path / "a.png", "top left"))
    assert main(["show", good, good, "--place", "99", "0", "-o", str(output)]) == 1
    assert "the grid has 18 rows and 18 columns" in capsys.readouterr().err
    assert not output.exists()
