# SPDX-License-Identifier: Apache-2.0
"""Features with their grid are brought into vLLM's form, or refused by what is wrong with them."""

from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from vllm_spyre_mm.frontend.grid_embeddings import GridForm

WIDTH = 8
IMAGE = GridForm(
    "image", frozenset({"image_embeds", "image_grid_thw"}), frozenset(), merge=2, width=WIDTH
)
VIDEO = GridForm(
    "video",
    frozenset({"video_embeds", "video_grid_thw", "timestamps"}),
    frozenset({"second_per_grid_ts"}),
    merge=2,
    width=WIDTH,
)


def rows(count: int, **more: Any) -> torch.Tensor:
    return torch.arange(float(count)).unsqueeze(1).expand(-1, WIDTH).to(**more)


def image(count: int = 6, grid: Any = (1, 4, 6), **more: Any) -> dict[str, Any]:
    return {"image_embeds": rows(count), "image_grid_thw": torch.tensor(grid), **more}


def video(count: int = 12, grid: Any = (2, 4, 6), **more: Any) -> dict[str, Any]:
    return {
        "video_embeds": rows(count),
        "video_grid_thw": torch.tensor(grid),
        "timestamps": [0.5, 1.5],
        **more,
    }


@pytest.mark.parametrize("grid", [(1, 4, 6), [[1, 4, 6]], torch.tensor([1, 4, 6], dtype=torch.int)])
def test_one_item_needs_no_axis_of_items(grid: Any) -> None:
    checked = IMAGE.checked(image() | {"image_grid_thw": grid})
    assert checked["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert checked["image_grid_thw"].dtype == torch.int64
    assert torch.equal(checked["image_embeds"], rows(6))


def test_several_items_may_be_one_tensor_or_a_list_or_an_object_each() -> None:
    """All are vLLM's form in the end."""
    first, second = image(), image(2, (1, 2, 4))
    grid = [[1, 4, 6], [1, 2, 4]]
    both = torch.cat([first["image_embeds"], second["image_embeds"]])
    for given in (
        {"image_embeds": both, "image_grid_thw": grid},
        {"image_embeds": [first["image_embeds"], second["image_embeds"]], "image_grid_thw": grid},
        [first, second],
        (first, second),
    ):
        checked = IMAGE.checked(given)
        assert torch.equal(checked["image_embeds"], both)
        assert checked["image_grid_thw"].tolist() == grid


def test_the_seconds_of_frames_are_lists() -> None:
    for given in ([0.5, 1.5], [[0.5, 1.5]], torch.tensor([0.5, 1.5]), torch.tensor([[0.5, 1.5]])):
        assert VIDEO.checked(video(timestamps=given))["timestamps"] == [[0.5, 1.5]]
    three = video(6, (1, 4, 6), timestamps=[3])
    assert VIDEO.checked([video(), three])["timestamps"] == [[0.5, 1.5], [3.0]]
    (seconds,) = VIDEO.checked(video(second_per_grid_ts=[0.25]))["second_per_grid_ts"]
    assert seconds == torch.tensor(0.25)


NAN = rows(6).clone()
NAN[3, 1] = float("nan")

FAULTS: dict[str, tuple[GridForm, Any, str]] = {
    "a tensor": (IMAGE, rows(6)[None], "embedding 0 .* needs the fields image_embeds, image_grid_"),
    "tensors": (IMAGE, [image(), rows(6)], "image embedding 1 of the prompt .* it is no object"),
    "no grid": (IMAGE, {"image_embeds": rows(6)}, "it lacks image_grid_thw"),
    "no seconds": (VIDEO, video() | {"timestamps": None}, "needs seconds from 0 on in timestamps"),
    "too much": (IMAGE, image(x=1), "it has x too"),
    "two numbers": (IMAGE, image(grid=(4, 6)), "needs three numbers for each item"),
    "no numbers": (IMAGE, image() | {"image_grid_thw": "1"}, "needs three numbers for each item"),
    "ragged": (IMAGE, image() | {"image_grid_thw": [[1], [2, 3]]}, "needs three numbers for each"),
    "fractions": (IMAGE, image(grid=(1.0, 4.0, 6.0)), "needs whole numbers from 1 on"),
    "nothing": (IMAGE, image(grid=(1, 0, 6)), "needs whole numbers from 1 on"),
    "negative": (IMAGE, image(grid=(1, -4, -6)), "needs whole numbers from 1 on"),
    "no squares": (IMAGE, image(grid=(1, 3, 6)), "rows and columns are no multiples of 2"),
    "frames": (IMAGE, image(12, (2, 4, 6)), "but an image has one frame"),
    "rows": (IMAGE, image(7), r"has 7 rows, but its .* \[\[1, 4, 6\]\] stands for 6"),
    "frames' rows": (VIDEO, video(11), "has 11 rows, but its video_grid_thw of .* stands for 12"),
    "grids": (IMAGE, [image(12, [[1, 4, 6]] * 2)], "has 2 grids: give an object for each"),
    "width": (
        IMAGE,
        image() | {"image_embeds": rows(6)[:, :5]},
        r"has image_embeds of shape \(6, 5\): its rows have 5 elements, the model's 8",
    ),
    "one of two widths": (
        IMAGE,
        {"image_embeds": [rows(3), rows(3)[:, :5]], "image_grid_thw": (1, 4, 6)},
        "its rows have 5 elements",
    ),
    "rank": (IMAGE, image() | {"image_embeds": rows(6)[None]}, "it has 3 dimensions, not 2"),
    "NaN": (IMAGE, image() | {"image_embeds": NAN}, "it holds NaN or infinity"),
    "a list": (IMAGE, image() | {"image_embeds": rows(6).tolist()}, "needs a tensor as image_emb"),
    "too few seconds": (VIDEO, video(timestamps=[1]), "one for each frame of its grid"),
    "too many": (VIDEO, video(timestamps=[1, 2, 3]), "one for each frame of its grid"),
    "before the start": (VIDEO, video(timestamps=[-1, 2]), "one for each frame of its grid"),
    "never": (VIDEO, video(timestamps=[1, float("nan")]), "one for each frame of its grid"),
    "words": (VIDEO, video(timestamps=["a", "b"]), "one for each frame of its grid"),
    "rates": (VIDEO, video(second_per_grid_ts=[1, 2]), "second_per_grid_ts, one for each video"),
    "some rates": (
        VIDEO,
        [video(), video(second_per_grid_ts=[1])],
        "has objects of different fields",
    ),
}


@pytest.mark.parametrize(("form", "given", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_named(form: GridForm, given: Any, fault: str) -> None:
    with pytest.raises(VLLMValidationError, match=fault) as error:
        form.checked(given)
    assert error.value.parameter == form.modality


def test_an_embedding_among_others_is_named_by_its_place() -> None:
    with pytest.raises(VLLMValidationError, match="the image embedding 5 of the prompt"):
        IMAGE.checked([image(), image(7)], [2, 5])
