# SPDX-License-Identifier: Apache-2.0
"""Which modality, which depths and which frames come back, through a real engine of Qwen3-VL."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from tests import architectures, qwen_vl
from tests.e2e.engines import engine
from tests.multimodal.mm_mappings.suite import picture
from tests.videos import video

HIDDEN_SIZE, LEVELS = 256, 3
PICTURES = [picture(96, 64), picture(70, 130)]
FILM = video(6, 64, 96)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    checkpoint = tmp_path_factory.mktemp("qwen3_vl")
    architectures.save_checkpoint(checkpoint, qwen_vl.qwen3_vl())
    with engine(
        checkpoint,
        own_process=True,
        max_num_batched_tokens=128,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 2, "video": 1},
    ) as llm:
        yield llm


def ask(llm: LLM, choice: Any = True, *, tags: str = "ivi") -> Any:
    """The answer about pictures and a video in any order."""
    named = {"i": qwen_vl.IMAGE, "v": qwen_vl.VIDEO}
    data: dict[str, Any] = {"image": PICTURES[: tags.count("i")], "video": [FILM.item]}
    kept = {kind: items for kind, items in data.items() if kind[0] in tags}
    request = {"prompt": " ".join(named[tag] for tag in tags) + " what?"}
    params = SamplingParams(temperature=0, max_tokens=3, extra_args={"return_mm_embedding": choice})
    (output,) = llm.generate({**request, "multi_modal_data": kept} if kept else request, params)
    return output.outputs[0]


@pytest.fixture(scope="module")
def whole(llm: LLM) -> Any:
    return ask(llm)


def rows_of(completion: Any, place: int) -> torch.Tensor:
    item = completion.mm_embedding_info.items[place]
    return completion.mm_embedding[item.start : item.end]


def test_all_items_and_depths_come_back_in_prompt_order(whole: Any) -> None:
    info = whole.mm_embedding_info
    assert info.levels == LEVELS
    assert whole.mm_embedding.shape[1] == HIDDEN_SIZE * (1 + LEVELS)
    named = [(item.modality, item.index) for item in info.items]
    assert named == [("image", 0), ("video", 0), ("image", 1)]
    first, film, _ = info.items
    assert (first.layout.frames, film.layout.frames) == (1, 3)  # two frames are merged
    assert film.layout.num_features == film.end - film.start
    assert film.layout.base_places().numel() == film.layout.num_features
    depths = whole.mm_embedding.unflatten(1, (1 + LEVELS, HIDDEN_SIZE))
    assert all(not torch.allclose(depths[:, 0], depths[:, level]) for level in range(1, 4))


@pytest.mark.parametrize(("wanted", "places"), [(["image"], [0, 2]), (["video"], [1])])
def test_items_of_other_modalities_are_left_out(
    llm: LLM, whole: Any, wanted: list[str], places: list[int]
) -> None:
    found = ask(llm, {"modalities": wanted})
    assert torch.equal(found.mm_embedding, torch.cat([rows_of(whole, each) for each in places]))
    expected = [whole.mm_embedding_info.items[place] for place in places]
    for ours, theirs in zip(found.mm_embedding_info.items, expected, strict=True):
        assert (ours.modality, ours.index) == (theirs.modality, theirs.index)
        assert (ours.offset, ours.content_hash) == (theirs.offset, theirs.content_hash)
    assert found.token_ids == whole.token_ids


def test_a_request_without_items_of_the_modality_gets_none(llm: LLM) -> None:
    for tags in ("i", ""):
        assert ask(llm, {"modalities": ["video"]}, tags=tags).mm_embedding is None


def test_a_modality_that_the_model_lacks_is_refused(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="'audio', and the model takes image and video"):
        ask(llm, {"modalities": ["image", "audio"]})


def test_the_columns_of_the_input_alone(llm: LLM, whole: Any) -> None:
    found = ask(llm, {"levels": "input"})
    assert found.mm_embedding_info.levels == 0
    assert found.mm_embedding.is_contiguous()
    assert torch.equal(found.mm_embedding, whole.mm_embedding[:, :HIDDEN_SIZE])
    num_bytes = found.mm_embedding.nbytes
    bounded = ask(llm, {"levels": "input", "max_bytes": num_bytes})
    assert torch.equal(bounded.mm_embedding, found.mm_embedding)
    with pytest.raises(VLLMValidationError, match=f"{4 * num_bytes} bytes, more than"):
        ask(llm, {"max_bytes": 4 * num_bytes - 1})


def test_a_mean_for_each_frame(llm: LLM, whole: Any) -> None:
    for _ in range(2):  # the second time nobody sends the video to the engine
        found = ask(llm, {"pooling": "frame", "max_bytes": 5 * HIDDEN_SIZE * (1 + LEVELS) * 4})
        assert [item.end - item.start for item in found.mm_embedding_info.items] == [1, 3, 1]
    for place, item in enumerate(whole.mm_embedding_info.items):
        frames = rows_of(whole, place)[item.layout.base_places()]
        assert torch.allclose(rows_of(found, place), frames.mean(dim=(1, 2)), atol=1e-5)


def test_int8_keeps_each_depth(llm: LLM, whole: Any) -> None:
    found = ask(llm, {"dtype": "int8"})
    scales = found.mm_embedding_info.scales
    assert scales.shape == (len(found.mm_embedding), 1 + LEVELS)
    depths = found.mm_embedding.float().unflatten(1, (1 + LEVELS, HIDDEN_SIZE))
    exact = whole.mm_embedding.unflatten(1, (1 + LEVELS, HIDDEN_SIZE))
    off = (depths * scales.unsqueeze(2) - exact).abs()
    assert (off <= exact.abs().amax(dim=2, keepdim=True) / 253).all()
