# SPDX-License-Identifier: Apache-2.0
"""A request chooses its embedding, and gives one back in, through real engines."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import BeamSearchParams

from tests.e2e.engines import engine
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner

ONE = "<|user|>\n<image>\nWhat is in the picture?\n<|assistant|>\n"
TWO = "<|user|>\n<image>\n<image>\nWhat is in the picture?\n<|assistant|>\n"


def drawn(seed: int, size: tuple[int, int] = (150, 110)) -> Image.Image:
    rng = random.Random(f"choice-{seed}")
    return pictures.draw_picture(pictures.random_shapes(rng, 2), size, rng=rng).image


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> Iterator[LLM]:
    with engine(demo_checkpoint, max_num_batched_tokens=128, enable_mm_embeds=True) as llm:
        yield llm


def ask(llm: LLM, images: list[Any], choice: Any = None, **more: Any) -> Any:
    """The answer to a question about images."""
    text = ONE.replace("<image>", "\n".join(["<image>"] * len(images)))
    prompt = {"prompt": text, "multi_modal_data": {"image": images}}
    extra = None if choice is None else {"return_mm_embedding": choice}
    parameters = {"temperature": 0.0, "max_tokens": 20, **more}
    (output,) = llm.generate(prompt, SamplingParams(extra_args=extra, **parameters))
    return output.outputs[0]


def rows_of(completion: Any, index: int) -> torch.Tensor:
    item = completion.mm_embedding_info.items[index]
    return completion.mm_embedding[item.start : item.end]


def encoder_calls(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every run of the encoder."""
    runner: SpyreModelRunner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    calls: list[Any] = []
    original = runner.spyre_model.encode_pieces
    monkeypatch.setattr(
        runner.spyre_model, "encode_pieces", lambda kwargs: calls.append(kwargs) or original(kwargs)
    )
    return calls


def test_each_request_of_a_batch_has_its_own_choice(llm: LLM) -> None:
    choices: list[Any] = [True, False, {"pooling": "image"}, {"dtype": "int8"}]
    prompts: Any = [
        {"prompt": TWO, "multi_modal_data": {"image": [drawn(1), drawn(2, (60, 60))]}}
    ] * len(choices)
    parameters = [
        SamplingParams(temperature=0, max_tokens=3, extra_args={"return_mm_embedding": choice})
        for choice in choices
    ]
    raw, none, means, small = (output.outputs[0] for output in llm.generate(prompts, parameters))
    assert none.mm_embedding is None
    assert none.mm_embedding_info is None
    assert means.mm_embedding.shape == (2, 256)
    for index in (0, 1):
        rows, item = rows_of(raw, index), raw.mm_embedding_info.items[index]
        assert len(rows) == item.layout.num_features
        mean = rows[item.layout.places()].mean(dim=0)
        assert torch.allclose(means.mm_embedding[index], mean, atol=1e-5)
    scales = small.mm_embedding_info.scales.unsqueeze(1)
    error = (small.mm_embedding * scales - raw.mm_embedding).abs()
    assert (error <= scales / 2 * 1.001).all()


def test_a_beam_search_is_made_of_requests_that_want_none(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[int] = []
    accounts = llm.llm_engine.engine_core.engine_core.scheduler._embedding_budget  # type: ignore[attr-defined]
    monkeypatch.setattr(accounts, "record_returned", returned.append)
    prompt: Any = {"prompt": ONE, "multi_modal_data": {"image": drawn(30)}}
    (found,) = llm.beam_search([prompt], BeamSearchParams(beam_width=3, max_tokens=4))
    assert len(found.sequences) == 3
    assert len(returned) >= 4
    assert set(returned) == {0}
    assert ask(llm, [drawn(30)]).mm_embedding is not None  # the default is back
    assert sum(returned) == 1


def test_items_say_where_each_image_is(llm: LLM) -> None:
    first, second = drawn(3), drawn(4, (60, 200))
    completion = ask(llm, [first, second])
    one, two = completion.mm_embedding_info.items
    assert (one.modality, one.index, two.index) == ("image", 0, 1)
    assert one.end == two.start
    assert two.offset > one.offset + one.layout.num_features - 1
    assert torch.equal(rows_of(completion, 1), ask(llm, [second]).mm_embedding)
    assert one.content_hash == ask(llm, [first]).mm_embedding_info.items[0].content_hash
    assert one.content_hash != two.content_hash


def test_a_place_of_the_picture_is_where_the_layout_says(llm: LLM) -> None:
    """A shape in one quarter of a picture changes the features of that quarter the most."""
    before = ask(llm, [pictures.draw_picture([], (144, 144)).image])
    for place in pictures.PLACES:
        shape = pictures.Shape("circle", "red", place)
        after = ask(llm, [pictures.draw_picture([shape], (144, 144)).image])
        change = (after.mm_embedding - before.mm_embedding).norm(dim=1)
        layout = after.mm_embedding_info.items[0].layout
        for grid in (layout.base, layout.fine):
            quarters = F.adaptive_avg_pool2d(change[grid.indices()][None], (2, 2))[0]
            down, across = "bottom" in place, "right" in place
            assert quarters.flatten().argmax() == 2 * down + across


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ("yes", "must be true, false or an object"),
        ({"pooling": "median"}, "pooling"),
        ({"max_bytes": 9}, "more than the limit of 9"),
        ({"generate": False}, "needs max_tokens=1"),
    ],
    ids=str,
)
def test_a_choice_that_there_is_not(llm: LLM, choice: Any, named: str) -> None:
    image = drawn(5)
    with pytest.raises(VLLMValidationError, match=named):
        ask(llm, [image], choice)
    assert ask(llm, [image]).mm_embedding is not None


def test_without_the_decoder(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [drawn(6), drawn(7)]
    runner: SpyreModelRunner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    with monkeypatch.context() as patch:
        patch.setattr(runner.spyre_model, "forward", None)  # it would fail if it were called
        alone = ask(llm, images, {"generate": False}, max_tokens=1)
    asked = ask(llm, images)
    assert torch.equal(alone.mm_embedding, asked.mm_embedding)


def test_a_request_without_the_decoder_leaves_nothing_in_the_prefix_cache(llm: LLM) -> None:
    images = [drawn(8), drawn(9)]
    ask(llm, images, {"generate": False}, max_tokens=1)
    after = ask(llm, images).text
    llm.reset_prefix_cache()
    assert ask(llm, images).text == after
    assert len(after) > 10


def test_a_dtype_that_would_overflow_fails_its_request_alone(llm: LLM) -> None:
    huge = ask(llm, [drawn(8)]).mm_embedding * 1e6
    prompts: Any = [{"prompt": ONE, "multi_modal_data": {"image": [huge]}}] * 3
    choices: list[Any] = [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "float16"}]
    choices[2]["generate"] = False
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=3 if choice.get("generate", True) else 1,
            extra_args={"return_mm_embedding": choice},
        )
        for choice in choices
    ]
    first, second, third = (each.outputs[0] for each in llm.generate(prompts, parameters))
    for failed in (first, third):
        assert failed.finish_reason == "error"
        assert "which float16 cannot hold (65504 at most): choose dtype 'bfloat16'" in str(
            failed.stop_reason
        )
        assert failed.mm_embedding is None
    assert second.mm_embedding.isfinite().all()
    assert len(second.token_ids) == 3
    assert ask(llm, [huge], max_tokens=3).token_ids == second.token_ids  # prefix and image: whole


# -- back in ---------------------------------------------------------------------------------------


def test_an_embedding_instead_of_its_picture(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [drawn(10), drawn(11, (60, 90))]
    seen = ask(llm, images)
    parts = [rows_of(seen, 0), rows_of(seen, 1)]
    calls = encoder_calls(llm, monkeypatch)
    back = ask(llm, parts)
    assert calls == []
    assert back.token_ids == seen.token_ids
    assert torch.equal(back.mm_embedding, seen.mm_embedding)
    assert [item.layout for item in back.mm_embedding_info.items] == [None, None]
    assert isinstance(back, CompletionOutput)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda rows: rows[:, :5], "hidden dimension"),
        (lambda rows: rows[:0], "no rows"),
        (lambda rows: rows.int(), "dtype"),
        (lambda rows: rows * float("nan"), "NaN or infinity"),
        (lambda rows: rows / 0, "NaN or infinity"),
        (lambda rows: rows[None, None], "shape"),
    ],
    ids=["width", "rows", "dtype", "nan", "infinity", "rank"],
)
def test_an_embedding_that_cannot_be_used(llm: LLM, spoil: Any, named: str) -> None:
    rows = ask(llm, [drawn(12)]).mm_embedding
    with pytest.raises((ValueError, VLLMValidationError), match=named):
        ask(llm, [spoil(rows)])
    assert torch.equal(ask(llm, [rows]).mm_embedding, rows)


@pytest.mark.parametrize("given", ["pe", "ep", "pep", "epep"])
def test_embeddings_and_pictures_in_any_order(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """As if all were pictures, and the encoder runs for those that are."""
    sizes = [(150, 110), (60, 90), (90, 90), (200, 70)]
    images = [drawn(20 + i, size) for i, size in enumerate(sizes[: len(given)])]
    seen = ask(llm, images)
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()  # type: ignore[attr-defined]
    llm.reset_prefix_cache()
    calls = encoder_calls(llm, monkeypatch)
    mixed = [
        rows_of(seen, i) if kind == "e" else image
        for i, (kind, image) in enumerate(zip(given, images, strict=True))
    ]
    back = ask(llm, mixed)
    assert len(calls) > 0
    assert back.token_ids == seen.token_ids
    assert torch.allclose(back.mm_embedding, seen.mm_embedding, atol=1e-5)
    layouts = [item.layout is None for item in back.mm_embedding_info.items]
    assert layouts == [kind == "e" for kind in given]


def test_an_embedding_among_pictures_is_checked_like_any(llm: LLM) -> None:
    rows = ask(llm, [drawn(13)]).mm_embedding
    with pytest.raises(VLLMValidationError, match=r"image embedding 1 of .*: it has no rows"):
        ask(llm, [drawn(13), rows[:0]])
    with pytest.raises(VLLMValidationError, match="image 1 of the prompt is an array"):
        ask(llm, [rows, rows[0]])
    assert torch.equal(ask(llm, [rows]).mm_embedding, rows)


def test_a_choice_by_place_of_an_embedding(llm: LLM) -> None:
    rows = ask(llm, [drawn(14)]).mm_embedding
    with pytest.raises(VLLMValidationError, match="chooses by place"):
        ask(llm, [rows], {"pooling": "base"})
    mean = ask(llm, [rows], {"pooling": "image"}).mm_embedding
    assert torch.allclose(mean[0], rows.mean(dim=0), atol=1e-5)


def test_opting_in_and_asking_where_it_is_off(demo_checkpoint: Path) -> None:
    settings = {"return_mm_embedding_by_default": False}
    with engine(demo_checkpoint, additional_config=settings) as llm:
        assert ask(llm, [drawn(15)]).mm_embedding is None
        assert ask(llm, [drawn(15)], True).mm_embedding is not None
        with pytest.raises(VLLMValidationError, match="is given as an embedding"):
            ask(llm, [drawn(15), torch.ones(5, 256)])
    with engine(demo_checkpoint, enable_return_mm_embedding=False) as llm:
        assert ask(llm, [drawn(15)]).mm_embedding is None
        with pytest.raises(VLLMValidationError, match="started without it"):
            ask(llm, [drawn(15)], True)
        assert ask(llm, [drawn(15)]).text
