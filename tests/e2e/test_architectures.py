# SPDX-License-Identifier: Apache-2.0
"""Each architecture in an engine of its own: tokens and embeddings equal those of Transformers.

Zero, one and three pictures, in one batch and alone, prompts in several chunks, a second time from
the prefix cache.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig
from vllm import LLM, RequestOutput
from vllm.exceptions import VLLMValidationError

from tests import architectures, granite4_vision, idefics3, llava_onevision
from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy, nothing_compiled, relative_error
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

MAX_TOKENS = 12
BOUND = 1e-4

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "LLaVA-Next, CLIP, Mistral": architectures.llava_next(architectures.mistral()),
    "LLaVA-Next, CLIP, Llama": architectures.llava_next(architectures.llama()),
    "LLaVA-OneVision, SigLIP, Qwen 2": llava_onevision.llava_onevision(architectures.qwen2()),
    "LLaVA 1.5, CLIP, Llama": architectures.llava(architectures.llama()),
    "Mistral 3, Mistral": architectures.mistral3(architectures.mistral()),
    "Mistral 3, Ministral 3": architectures.mistral3(architectures.ministral3()),
    "Idefics 3, Llama": idefics3.idefics3(architectures.llama()),
    "SmolVLM, Llama": idefics3.smolvlm(architectures.llama()),
    "Granite Vision 4, SigLIP, Granite": granite4_vision.granite4_vision(),
    "Granite": architectures.granite(),
    "Granite 4, dense": architectures.granite4(),
    "Llama": architectures.llama(),
    "Qwen 2": architectures.qwen2(),
    "Qwen 3": architectures.qwen3(),
}


TAKES_EMBEDDINGS = ("llava", "llava_next", "llava_onevision", "granite4_vision")


class Served:
    """An architecture in an engine, with its reference.

    Args:
        path: where the checkpoint is written.
        config: of the model.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        self.checkpoint = architectures.save_checkpoint(path, config)
        self.reference = Reference(self.checkpoint)
        self.takes_embeddings = config.model_type in TAKES_EMBEDDINGS
        self.tag = getattr(self.reference.processor, "image_token", None)
        self.asks = [
            replace(ask, tag=self.tag or "")
            for ask in parity_asks(18, seed=3)
            if self.tag or not ask.images
        ]
        self.expected = [self.reference_tokens(ask) for ask in self.asks]
        self.llm: LLM

    def reference_tokens(self, ask: Ask) -> list[int]:
        return self.reference.generate(ask.text, list(ask.images), MAX_TOKENS)

    def ask(self, asks: list[Ask]) -> list[RequestOutput]:
        return self.llm.generate([ask.prompt for ask in asks], greedy(MAX_TOKENS), use_tqdm=False)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("architecture"), ARCHITECTURES[request.param])
    with engine(
        served.checkpoint,
        max_num_batched_tokens=128,
        max_model_len=4096,
        limit_mm_per_prompt={"image": 32},
        enable_mm_embeds=served.takes_embeddings,
    ) as llm:
        served.llm = llm
        yield served


def test_answers_vary_and_equal_those_of_transformers(served: Served) -> None:
    assert len({tuple(tokens) for tokens in served.expected}) > len(served.expected) // 2
    assert sum(len(set(tokens)) > MAX_TOKENS // 2 for tokens in served.expected) >= 4
    outputs = served.ask(served.asks)
    assert [list(output.outputs[0].token_ids) for output in outputs] == served.expected


def test_alone_and_from_the_prefix_cache(served: Served) -> None:
    for ask, expected in list(zip(served.asks, served.expected, strict=True))[:6]:
        (output,) = served.ask([ask])
        assert list(output.outputs[0].token_ids) == expected


def test_embeddings_equal_those_of_transformers(served: Served) -> None:
    for ask, output in zip(served.asks, served.ask(served.asks), strict=True):
        embedding = output.outputs[0].mm_embedding
        if ask.images:
            expected = served.reference.features(ask.text, list(ask.images))
            assert relative_error(embedding, expected) < BOUND
        else:
            assert embedding is None


def test_embeddings_are_taken_back(served: Served) -> None:
    if not served.takes_embeddings:
        pytest.skip("vLLM takes none for this architecture")
    ask = next(ask for ask in served.asks if len(ask.images) == 3)
    (output,) = served.ask([ask])
    first = output.outputs[0]
    rows = [first.mm_embedding[item.start : item.end] for item in first.mm_embedding_info.items]
    prompt = {"prompt": ask.text, "multi_modal_data": {"image": rows}}
    (output,) = served.llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
    assert output.outputs[0].token_ids == first.token_ids


def test_pictures_smaller_than_a_tile_and_of_extreme_shapes(served: Served) -> None:
    if served.tag is None:
        pytest.skip("a text model")
    sizes = [(1, 1), (3, 2), (200, 3), (3, 200), (1000, 1), (1, 1000), (4000, 10)]
    for size in sizes:
        ask = Ask("What is it?", (picture(*size), picture(50, 40)), served.tag)
        try:
            expected = served.reference_tokens(ask)
        except ValueError:  # Pixtral's processor scales the short side to nothing
            assert max(size) > 90 * min(size)
            with pytest.raises(VLLMValidationError, match="refuses the images or videos"):
                served.ask([ask])
            continue
        (output,) = served.ask([ask])
        assert list(output.outputs[0].token_ids) == expected, size


def test_as_many_pictures_as_a_request_may_have(served: Served) -> None:
    if served.tag is None:
        pytest.skip("a text model")
    ask = Ask("Which?", tuple(picture(40 + i, 60 - i) for i in range(32)), served.tag)
    (output,) = served.ask([ask])
    assert list(output.outputs[0].token_ids) == served.reference_tokens(ask)
    embedding = output.outputs[0].mm_embedding
    assert relative_error(embedding, served.reference.features(ask.text, list(ask.images))) < BOUND


@pytest.mark.parametrize("name", ["Mistral 3, Ministral 3", "Idefics 3, Llama"])
def test_the_warmups_graphs_serve_pictures_of_every_size(tmp_path: Path, name: str) -> None:
    """Where pictures differ the most in shape or in tiles: a graph for all, and one decoder's."""
    torch._dynamo.reset()
    served = Served(tmp_path, ARCHITECTURES[name])
    with engine(served.checkpoint, max_num_batched_tokens=128, enforce_eager=False) as llm:
        served.llm = llm
        with nothing_compiled():
            outputs = served.ask(served.asks)
            assert [list(output.outputs[0].token_ids) for output in outputs] == served.expected


def test_the_page_has_a_row_for_each_of_them() -> None:
    page = Path(__file__).parents[2] / "docs" / "supported-models.md"
    _, _, section = page.read_text().partition("## What was tested")
    section, _, _ = section.partition("\n## ")
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")]
    assert [row.removeprefix("| ") for row in rows[3:]] == list(ARCHITECTURES)
