# SPDX-License-Identifier: Apache-2.0
"""Granite Vision 4 in engines of its own: its levels, however a prompt is cut up and resumed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from tests import architectures, granite4_vision
from tests.e2e.engines import Ask, engine, greedy, nothing_compiled, relative_error
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

MAX_TOKENS = 10
WIDTH, LEVELS, SIDE = 128, granite4_vision.LEVELS, 4

SIZES = [(48, 48), (96, 48), (250, 40), (40, 250), (150, 100), (17, 23)]
"""Widths and heights; the first two are whole tiles."""


def asks() -> list[Ask]:
    """Requests with none, one and three pictures."""
    pictures = [picture(*size) for size in SIZES]
    return [
        Ask("What is it?"),
        *(Ask(f"Number {i}?", (each,)) for i, each in enumerate(pictures)),
        Ask("Which?", tuple(pictures[:3])),
        Ask("Which of them?", (pictures[3], pictures[0], pictures[3])),
    ]


class Served:
    """The checkpoint, its reference, and what is asked.

    Args:
        path: where the checkpoint is written.
    """

    def __init__(self, path: Path) -> None:
        config = granite4_vision.granite4_vision()
        self.checkpoint = architectures.save_checkpoint(path, config)
        self.reference = Reference(self.checkpoint)
        self.asks = asks()
        self.expected = [self.answer(ask) for ask in self.asks]

    def answer(self, ask: Ask) -> list[int]:
        return self.reference.generate(ask.text, list(ask.images), MAX_TOKENS)

    def engine(self, **arguments: Any) -> Any:
        """An engine whose chunks have one block: a picture takes several."""
        return engine(self.checkpoint, **{"max_num_batched_tokens": 64} | arguments)


def tokens(llm: LLM, asked: Sequence[Ask]) -> list[list[int]]:
    outputs = llm.generate([ask.prompt for ask in asked], greedy(MAX_TOKENS), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("granite4"))


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[LLM]:
    with served.engine() as llm:
        yield llm


def test_the_expected_answers_vary(served: Served) -> None:
    """Otherwise the comparisons below would prove little."""
    assert len({tuple(each) for each in served.expected}) > len(served.expected) // 2


def test_prompts_and_answers_are_those_of_transformers(served: Served, llm: LLM) -> None:
    outputs = llm.generate([ask.prompt for ask in served.asks], greedy(MAX_TOKENS), use_tqdm=False)
    for ask, output, expected in zip(served.asks, outputs, served.expected, strict=True):
        inputs = served.reference.inputs(ask.text, ask.images)
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist(), ask.question
        assert list(output.outputs[0].token_ids) == expected, ask.question


def test_from_a_prefix_cache_that_ends_inside_a_picture(served: Served, llm: LLM) -> None:
    llm.reset_prefix_cache()
    hits = 0
    for ask, expected in zip(served.asks, served.expected, strict=True):
        for _ in range(2):
            (output,) = llm.generate([ask.prompt], greedy(MAX_TOKENS), use_tqdm=False)
            assert list(output.outputs[0].token_ids) == expected, ask.question
        prompt, end = output.prompt_token_ids, output.num_cached_tokens or 0
        hits += end > 0 and {prompt[end - 1], prompt[end]} == {granite4_vision.IMAGE_TOKEN_ID}
    assert hits > 1


def test_an_embedding_has_all_levels_and_says_where_its_features_are(
    served: Served, llm: LLM
) -> None:
    ask = served.asks[-1]
    (output,) = llm.generate([ask.prompt], greedy(1), use_tqdm=False)
    embedding, info = output.outputs[0].mm_embedding, output.outputs[0].mm_embedding_info
    expected = served.reference.features(ask.text, list(ask.images))
    assert embedding.shape == (len(expected), LEVELS * WIDTH)
    levels = zip(embedding.split(WIDTH, 1), expected.split(WIDTH, 1), strict=True)
    assert all(relative_error(ours, theirs) < 1e-4 for ours, theirs in levels)
    layout = info.items[1].layout  # of a single tile beside the base tile
    assert (layout.base.rows, layout.base.columns) == (SIDE, SIDE)
    assert (layout.fine.rows, layout.fine.columns) == (SIDE, SIDE)
    newlines = info.items[1].start + torch.tensor(layout.newlines())
    assert len(newlines) == SIDE
    assert embedding[newlines].unique(dim=0).shape[0] == 1
    newline = embedding[newlines[0]]
    assert torch.equal(newline, newline[:WIDTH].repeat(LEVELS))


def test_levels_and_bytes_of_what_comes_back_may_be_chosen(served: Served, llm: LLM) -> None:
    def ask(choice: Any) -> Any:
        params = greedy(1, extra_args={"return_mm_embedding": choice})
        (output,) = llm.generate([served.asks[1].prompt], params, use_tqdm=False)
        return output.outputs[0]

    whole, first = ask(True), ask({"levels": "input"})
    assert whole.mm_embedding_info.levels == LEVELS - 1
    assert first.mm_embedding_info.levels == 0
    assert torch.equal(first.mm_embedding, whole.mm_embedding[:, :WIDTH])
    num_bytes = whole.mm_embedding.nbytes
    assert torch.equal(ask({"max_bytes": num_bytes}).mm_embedding, whole.mm_embedding)
    with pytest.raises(VLLMValidationError, match=f"{num_bytes} bytes, more than"):
        ask({"max_bytes": num_bytes - 1})
    small = ask({"dtype": "int8"})
    assert small.mm_embedding_info.scales.shape == (len(whole.mm_embedding), LEVELS)


def test_preempted_and_resumed(served: Served) -> None:
    """Blocks for about half of the requests: some lose theirs while they decode."""
    asked, expected = served.asks[1:] * 2, served.expected[1:] * 2
    with served.engine(
        num_gpu_blocks_override=26, max_model_len=1024, enable_prefix_caching=False
    ) as llm:
        assert tokens(llm, asked) == expected


def test_compiled_without_a_graph_for_each_number_of_tiles(served: Served) -> None:
    with served.engine(enforce_eager=False) as llm, nothing_compiled():
        assert tokens(llm, served.asks) == served.expected


def test_with_a_dense_hybrid_decoder(served: Served, tmp_path: Path) -> None:
    """The same numbers, stored as Granite 4 micro's are."""
    checkpoint = granite4_vision.save_with_hybrid_decoder(tmp_path / "hybrid", served.checkpoint)
    with engine(checkpoint, max_num_batched_tokens=64) as llm:
        assert tokens(llm, served.asks) == served.expected
