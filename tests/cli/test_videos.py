# SPDX-License-Identifier: Apache-2.0
"""Videos, and features with levels, on the command line: real files, a random Qwen3-VL."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import architectures, qwen_vl
from tests.cli.embedding_runs import read
from tests.multimodal.mm_mappings.suite import assert_close
from tests.reference import Reference
from tests.video_files import gif, mp4, still
from tests.videos import Video, video
from vllm_spyre_mm.cli import main
from vllm_spyre_mm.cli.media import read_item, read_video
from vllm_spyre_mm.multimodal.coloring import CAPTION_HEIGHT, PANEL_HEIGHT

HIDDEN_SIZE, LEVELS = 256, 3
FILM = video(12, 96, 64, fps=2.0)  # what the processor samples
FRAMES = 6  # two are merged


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3_vl")
    return architectures.save_checkpoint(path, qwen_vl.qwen3_vl())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """An MP4, an animated GIF and a picture."""
    contents = {"film.mp4": mp4(FILM), "film.gif": gif(FILM), "still.png": still()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


def embed(
    checkpoint: Path, files: list[Path], output: Path, *options: str
) -> dict[str, torch.Tensor]:
    paths = map(str, files)
    arguments = ["--model", str(checkpoint), "--encoder-dtype", "float32", "--eager", *options]
    assert main(["embed", *paths, "-o", str(output), *arguments]) == 0
    return read(output)


def test_a_file_is_a_picture_or_a_video(files: dict[str, Path]) -> None:
    kinds = [isinstance(read_item(file, ("image", "video")), tuple) for file in files.values()]
    assert kinds == [True, True, False]
    assert isinstance(read_item(files["film.gif"], ("image",)), Image.Image)
    with pytest.raises(ValueError, match="Failed to load image"):
        read_item(files["film.mp4"], ("image",))


def test_features_of_a_video_are_those_of_transformers(
    checkpoint: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """And so are those of a picture beside it."""
    shown = [files["film.mp4"], files["still.png"]]
    film, picture = embed(checkpoint, shown, tmp_path / "features.safetensors").values()
    reference = Reference(checkpoint)
    frames, metadata = read_video(files["film.mp4"], "qwen3_vl")
    decoded = Video(frames, metadata["fps"])
    assert_close(film, reference.video_features(qwen_vl.VIDEO, [decoded]), 1e-4)
    still = [Image.open(files["still.png"])]
    assert_close(picture, reference.features(qwen_vl.IMAGE, still), 1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_levels_and_frames_are_chosen(
    checkpoint: Path, files: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    def of(name: str, *options: str) -> dict[str, torch.Tensor]:
        return embed(checkpoint, [*files.values()], tmp_path / f"{name}.{suffix}", *options)

    whole, alone = of("whole"), of("alone", "--levels", "input")
    frames = of("frames", "--pooling", "frame")
    for path, rows in whole.items():
        assert rows.shape[1] == HIDDEN_SIZE * (1 + LEVELS)
        assert torch.equal(alone[path], rows[:, :HIDDEN_SIZE])
        count = FRAMES if "film" in path else 1
        assert_close(frames[path], rows.view(count, -1, rows.shape[1]).mean(dim=1), 1e-5)


def test_another_choice_of_levels_is_another_output(
    checkpoint: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "features.safetensors"
    embed(checkpoint, [files["still.png"]], output)
    again = ["embed", str(files["still.png"]), "-o", str(output), "--model", str(checkpoint)]
    assert main([*again, "--encoder-dtype", "float32", "--levels", "input"]) == 2
    assert "'levels': 'input'" in capsys.readouterr().err


def test_frames_are_drawn(checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    shown = ["--model", str(checkpoint), "-o", str(output)]
    assert main(["show", str(files["film.mp4"]), *shown]) == 0
    drawn = Image.open(output)
    width, row = round(96 * PANEL_HEIGHT / 64), CAPTION_HEIGHT + PANEL_HEIGHT
    assert drawn.size == (2 * width, FRAMES * row)
    panels = [drawn.crop((width, top, 2 * width, top + row)) for top in range(0, drawn.height, row)]
    assert len({panel.tobytes() for panel in panels}) == FRAMES
    first = drawn.crop((0, CAPTION_HEIGHT, width, row)).resize((96, 64), Image.Resampling.BOX)
    seen = torch.frombuffer(bytearray(first.tobytes()), dtype=torch.uint8).float()
    exact = torch.from_numpy(FILM.frames[0]).flatten().float()
    assert (seen - exact).abs().mean() < 12  # the film is compressed

    pair = [str(files["still.png"]), str(files["film.gif"])]
    assert main(["show", *pair, *shown]) == 0
    assert Image.open(output).height == (1 + FRAMES) * row
