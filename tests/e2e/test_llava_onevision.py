# SPDX-License-Identifier: Apache-2.0
"""Videos of LLaVA-OneVision in an engine: tokens and embeddings are those of Transformers.

Alone, beside pictures, in prompts of several chunks, from the prefix cache, compiled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput
from vllm.exceptions import VLLMValidationError

from tests import architectures, llava_onevision
from tests.e2e.engines import engine, greedy, nothing_compiled, relative_error
from tests.e2e.video_asks import VideoAsk
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference
from tests.videos import video

MAX_TOKENS = 12
BOUND = 1e-4


class OnevisionAsk(VideoAsk):
    image_tag, video_tag = llava_onevision.IMAGE, llava_onevision.VIDEO
    template = "<|user|>\n{items}\n{question}\n"


ASKS = [
    OnevisionAsk("What happens?", (), (video(6, 80, 64),)),
    OnevisionAsk("And in one frame?", (), (video(1, 40, 90),)),
    OnevisionAsk("Say what you see.", (), (video(40, 64, 48),)),
    # Of as many frames: Transformers makes one tensor of the videos of a prompt.
    OnevisionAsk("Which of them?", (), (video(3, 64, 90), video(3, 128, 64))),
    OnevisionAsk("Is it in both?", (picture(190, 150),), (video(4, 100, 60),)),
    OnevisionAsk("Where?", (picture(60, 50), picture(170, 30)), (video(2, 30, 30),)),
]


@dataclass(frozen=True)
class Served:
    """A checkpoint with its reference, and what that answers."""

    checkpoint: Path
    reference: Reference
    expected: list[list[int]]

    def engine(self, **arguments: Any) -> Any:
        defaults: dict[str, Any] = {
            "max_num_batched_tokens": 128,
            "limit_mm_per_prompt": {"image": 4, "video": 2},
            "enable_mm_embeds": True,
        }
        return engine(self.checkpoint, **defaults | arguments)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    config = llava_onevision.llava_onevision(architectures.qwen2())
    checkpoint = architectures.save_checkpoint(tmp_path_factory.mktemp("onevision"), config)
    reference = Reference(checkpoint)
    expected = [ask.expected(reference, MAX_TOKENS) for ask in ASKS]
    return Served(checkpoint, reference, expected)


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[LLM]:
    with served.engine() as llm:
        yield llm


def generate(llm: LLM, asks: list[OnevisionAsk]) -> list[RequestOutput]:
    return llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_expected_answers_vary(served: Served) -> None:
    assert len({tuple(each) for each in served.expected}) == len(ASKS)
    assert sum(len(set(each)) > MAX_TOKENS // 2 for each in served.expected) >= 3


def test_prompts_and_answers_are_those_of_transformers(served: Served, llm: LLM) -> None:
    outputs = generate(llm, ASKS)
    for ask, output in zip(ASKS, outputs, strict=True):
        inputs = served.reference.inputs(ask.text, ask.images, ask.videos)
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist(), ask.question
    assert tokens(outputs) == served.expected


def test_alone_and_from_a_prefix_cache_that_ends_inside_a_video(served: Served, llm: LLM) -> None:
    llm.reset_prefix_cache()
    hits = 0
    for ask, expected in zip(ASKS, served.expected, strict=True):
        for _ in range(2):
            (output,) = generate(llm, [ask])
            assert list(output.outputs[0].token_ids) == expected, ask.question
        prompt, end = output.prompt_token_ids, output.num_cached_tokens or 0
        around = set(prompt[end - 1 : end + 1]) if end else set()
        hits += around == {llava_onevision.VIDEO_TOKEN_ID}
    assert hits


def test_embeddings_are_those_of_transformers(served: Served, llm: LLM) -> None:
    for ask, output in zip(ASKS, generate(llm, ASKS), strict=True):
        completion = output.outputs[0]
        assert relative_error(completion.mm_embedding, ask.features(served.reference)) < BOUND
        items = completion.mm_embedding_info.items
        frames = [item.layout.frames for item in items if item.modality == "video"]
        assert frames == [len(each.frames) for each in ask.videos]


def test_a_row_for_each_frame(llm: LLM) -> None:
    """The newline behind the last frame belongs to none."""
    (whole,) = generate(llm, ASKS[:1])
    choice = {"return_mm_embedding": {"pooling": "frame"}}
    chosen = greedy(MAX_TOKENS, extra_args=choice)
    (output,) = llm.generate([ASKS[0].prompt], chosen, use_tqdm=False)
    rows = whole.outputs[0].mm_embedding[:-1].unflatten(0, (6, -1)).mean(dim=1)
    assert relative_error(output.outputs[0].mm_embedding, rows) < 1e-5


def test_a_pictures_embedding_is_taken_back_beside_a_video(served: Served, llm: LLM) -> None:
    ask, expected = ASKS[4], served.expected[4]
    (output,) = generate(llm, [ask])
    first = output.outputs[0]
    item = first.mm_embedding_info.items[0]
    prompt = ask.prompt
    prompt["multi_modal_data"]["image"] = [first.mm_embedding[item.start : item.end]]
    llm.reset_prefix_cache()
    (output,) = llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected


def test_a_videos_embedding_is_refused_with_a_sentence(llm: LLM) -> None:
    rows = torch.ones(10, 128)
    for given in ([rows], {"video_embeds": rows}, [ASKS[0].videos[0].frames, rows]):
        prompt = {"prompt": "<video><video> what?", "multi_modal_data": {"video": given}}
        with pytest.raises(VLLMValidationError, match=r"\(video\).*which vLLM cannot lay out"):
            llm.generate([prompt], greedy(1), use_tqdm=False)


def test_the_warmups_graphs_serve_videos(served: Served) -> None:
    """Of one frame and of many: no graph is made for them."""
    torch._dynamo.reset()
    with served.engine(enforce_eager=False) as llm, nothing_compiled():
        assert tokens(generate(llm, ASKS)) == served.expected
