# SPDX-License-Identifier: Apache-2.0
"""Qwen-VL in engines of its own: pictures and videos, tokens and embeddings of Transformers.

Prompts in chunks that cut pictures, from a prefix cache that ends inside of one, preempted, and
with features that are given back.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError

from tests import architectures, qwen_vl
from tests.e2e.engines import engine, greedy, nothing_compiled, relative_error
from tests.e2e.video_asks import VideoAsk
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference
from tests.videos import Video, video
from vllm_spyre_mm.worker.encoding import ImageEncoder

MAX_TOKENS = 12
BOUND = 1e-4
BF16_BOUND = 2e-2

QUESTIONS = ("What is it?", "Where does it stand, and why?", "Say what you see.", "And now?")


class QwenAsk(VideoAsk):
    image_tag, video_tag = qwen_vl.IMAGE, qwen_vl.VIDEO
    template = "<|im_start|>user\n{items}{question}<|im_end|>\n<|im_start|>assistant\n"

    @staticmethod
    def given(video: Video) -> Any:
        return video.item


def asks() -> list[QwenAsk]:
    """None, one and three pictures of several sizes, a video, and both."""
    sizes = [(64, 64), (250, 40), (40, 250), (300, 200), (17, 23), (130, 90), (200, 201)]
    pictures = [picture(*size) for size in sizes]
    return [
        *(QwenAsk(question) for question in QUESTIONS),
        *(QwenAsk(QUESTIONS[i % len(QUESTIONS)], (image,)) for i, image in enumerate(pictures)),
        QwenAsk("Which?", tuple(pictures[:3])),
        QwenAsk("Which of them?", (pictures[3], pictures[0], pictures[3])),
        QwenAsk("What happens?", (), (video(6, 80, 64),)),
        # No longer than they are wide: where a video's last moment is beyond its last column,
        # Transformers 5 lets the text behind it begin before that moment, the models do not.
        QwenAsk("What happens then?", (), (video(3, 64, 90), video(8, 128, 64, fps=2.0))),
        QwenAsk("Is it in both?", (pictures[5],), (video(4, 100, 60),)),
    ]


class Served:
    """One of the family, with its reference.

    Args:
        path: where the checkpoint is written.
        model_type: of the family.
    """

    def __init__(self, path: Path, model_type: str) -> None:
        self.model_type = model_type
        self.checkpoint = architectures.save_checkpoint(path, getattr(qwen_vl, model_type)())
        self.reference = Reference(self.checkpoint)
        self.asks = asks()
        self.expected = [ask.expected(self.reference, MAX_TOKENS) for ask in self.asks]

    def engine(self, **arguments: Any) -> Any:
        """An engine whose chunks have two blocks; it takes embeddings."""
        defaults: dict[str, Any] = {
            "max_num_batched_tokens": 128,
            "limit_mm_per_prompt": {"image": 4, "video": 2},
            "enable_mm_embeds": True,
        }
        return engine(self.checkpoint, **defaults | arguments)


def tokens(llm: LLM, asked: Sequence[QwenAsk]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in generate(llm, asked)]


def generate(llm: LLM, asked: Sequence[QwenAsk]) -> list[RequestOutput]:
    return llm.generate([ask.prompt for ask in asked], greedy(MAX_TOKENS), use_tqdm=False)


@pytest.fixture(scope="module", params=qwen_vl.MODEL_TYPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[LLM]:
    with served.engine() as llm:
        yield llm


def test_the_expected_answers_vary(served: Served) -> None:
    """Otherwise the comparisons below would prove little."""
    assert len({tuple(each) for each in served.expected}) > len(served.expected) // 2
    assert sum(len(set(each)) > MAX_TOKENS // 2 for each in served.expected) >= 4


def test_prompts_are_those_of_transformers(served: Served, llm: LLM) -> None:
    for ask, output in zip(served.asks, generate(llm, served.asks), strict=True):
        inputs = served.reference.inputs(ask.text, ask.images, ask.videos)
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist(), ask.question


def test_answers_are_those_of_transformers(served: Served, llm: LLM) -> None:
    assert tokens(llm, served.asks) == served.expected


def test_alone_and_from_a_prefix_cache_that_ends_inside_a_picture(served: Served, llm: LLM) -> None:
    llm.reset_prefix_cache()
    hits = 0
    for ask, expected in zip(served.asks, served.expected, strict=True):
        for _ in range(2):
            (output,) = generate(llm, [ask])
            assert list(output.outputs[0].token_ids) == expected, ask.question
        prompt, end = output.prompt_token_ids, output.num_cached_tokens or 0
        item_ids = {qwen_vl.token_id(f"<|{name}_pad|>") for name in ("image", "video")}
        hits += end > 0 and prompt[end - 1] in item_ids and prompt[end] in item_ids
    assert hits > 2


def test_embeddings_are_those_of_transformers(served: Served, llm: LLM) -> None:
    for ask, output in zip(served.asks, generate(llm, served.asks), strict=True):
        embedding = output.outputs[0].mm_embedding
        expected = ask.features(served.reference)
        if expected is None:
            assert embedding is None
            continue
        assert embedding.shape == expected.shape
        depths = zip(embedding.split(256, dim=1), expected.split(256, dim=1), strict=True)
        assert all(relative_error(ours, theirs) < BOUND for ours, theirs in depths)


def test_several_answers_to_one_prompt(served: Served, llm: LLM) -> None:
    ask, expected = served.asks[6], served.expected[6]
    likeliest = SamplingParams(temperature=1.0, top_k=1, n=2, max_tokens=MAX_TOKENS)
    (output,) = llm.generate([ask.prompt], likeliest, use_tqdm=False)
    assert [list(each.token_ids) for each in output.outputs] == [expected, expected]


def test_embeddings_are_taken_back(served: Served, llm: LLM) -> None:
    number = next(i for i, ask in enumerate(served.asks) if len(ask.images) == 3)
    ask = served.asks[number]
    (output,) = generate(llm, [ask])
    grids = served.reference.inputs(ask.text, ask.images)["image_grid_thw"]
    given = {"image_embeds": output.outputs[0].mm_embedding, "image_grid_thw": grids}
    llm.reset_prefix_cache()
    prompt = {"prompt": ask.text, "multi_modal_data": {"image": given}}
    (output,) = llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == served.expected[number]


def test_embeddings_of_videos_are_taken_back_with_their_times(served: Served, llm: LLM) -> None:
    number = next(i for i, ask in enumerate(served.asks) if len(ask.videos) == 2)
    ask = served.asks[number]
    (output,) = generate(llm, [ask])
    (first, second), rows = (
        output.outputs[0].mm_embedding_info.items,
        output.outputs[0].mm_embedding,
    )
    inputs = served.reference.inputs(ask.text, (), ask.videos)
    grids, given = inputs["video_grid_thw"].tolist(), []
    for item, film, grid in zip((first, second), ask.videos, grids, strict=True):
        assert (item.modality, item.layout.frames) == ("video", grid[0])
        back: dict[str, Any] = {
            "video_embeds": rows[item.start : item.end],
            "video_grid_thw": grid,
        }
        last = len(film.frames) - 1
        pairs = [(2 * pair, min(2 * pair + 1, last)) for pair in range(grid[0])]
        if served.model_type == "qwen3_vl":
            back["timestamps"] = [sum(pair) / 2 / film.fps for pair in pairs]
        elif served.model_type == "qwen2_5_vl":
            back["second_per_grid_ts"] = inputs["second_per_grid_ts"][len(given)].reshape(1)
        given.append(back)
    for items in (given, [given[0], ask.videos[1].item], [ask.videos[0].item, given[1]]):
        llm.reset_prefix_cache()
        prompt = {"prompt": ask.text, "multi_modal_data": {"video": items}}
        (output,) = llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
        assert list(output.outputs[0].token_ids) == served.expected[number]
        places = [item.layout for item in output.outputs[0].mm_embedding_info.items]
        assert places == [first.layout, second.layout]


def test_an_engine_for_videos_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoder is warm: a picture takes the graphs of a video."""
    encode, encoded = ImageEncoder.encode, []

    def counting(self: Any, images: Any) -> Any:
        encoded.extend(feature.modality for feature in images.values())
        return encode(self, images)

    monkeypatch.setattr(ImageEncoder, "encode", counting)
    number = next(i for i, ask in enumerate(served.asks) if ask.videos and not ask.images)
    with served.engine(limit_mm_per_prompt={"image": 0, "video": 2}) as llm:
        assert "image" in encoded
        assert tokens(llm, [served.asks[number]]) == [served.expected[number]]
        with pytest.raises(VLLMValidationError, match="At most 0 image"):
            generate(llm, [next(ask for ask in served.asks if ask.images)])


def test_preempted_and_resumed(served: Served) -> None:
    """Blocks for about half of the requests: some lose theirs while they decode."""
    asked = [ask for ask in served.asks if ask.images or ask.videos] * 2
    expected = [ask.expected(served.reference, MAX_TOKENS) for ask in asked]
    with served.engine(
        num_gpu_blocks_override=26, max_model_len=1024, enable_prefix_caching=False
    ) as llm:
        assert tokens(llm, asked) == expected


def test_compiled_without_a_graph_for_each_size(served: Served) -> None:
    with served.engine(enforce_eager=False) as llm, nothing_compiled():
        assert tokens(llm, served.asks) == served.expected


def test_in_bf16_and_compiled_as_users_have_it(served: Served) -> None:
    """Tokens as far as bf16 can tell the two best apart, features near to the reference's."""
    with served.engine(dtype="auto", enforce_eager=False) as llm:
        outputs = generate(llm, served.asks)
    compared = 0
    for ask, output in zip(served.asks, outputs, strict=True):
        completion, expected = output.outputs[0], ask.features(served.reference)
        certain = served.reference.certain_tokens(ask.text, ask.images, MAX_TOKENS, 1.0, ask.videos)
        assert list(completion.token_ids)[: len(certain)] == certain, ask.question
        compared += len(certain)
        if expected is not None:
            error = (completion.mm_embedding.float() - expected).norm() / expected.norm()
            assert error < BF16_BOUND, ask.question
    assert compared > 2 * len(served.asks)
