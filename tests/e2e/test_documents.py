# SPDX-License-Identifier: Apache-2.0
"""Pages as Idefics 3 takes them: 13 tiles and more, several in a request, row and column tokens
between the features, chunks that end anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm import LLM

from tests import architectures, idefics3
from tests.checkpoints import save_random_checkpoint
from tests.e2e.engines import Ask, engine, greedy, nothing_compiled, relative_error
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference
from vllm_spyre_mm.demo import checkpoint_path

CHUNK = 64
MAX_TOKENS = 8
IMAGE = 5

TOKENS = {
    "a token for each tile": idefics3.TOKENS,
    "tiles spelt out": idefics3.TOKENS[:3],
}


@dataclass(frozen=True)
class Served:
    """An engine for documents, with its reference.

    Attributes:
        llm: the engine.
        reference: Transformers on the same checkpoint.
    """

    llm: LLM
    reference: Reference


def save_checkpoint(path: Path, tokens: tuple[str, ...]) -> Path:
    def save_processor(path: Path, config: object) -> None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
        idefics3.save_processor(path, config, tokenizer, tiles=4, tokens=tokens)

    config = idefics3.idefics3(architectures.llama())
    return save_random_checkpoint(path, config, processor=save_processor)


@pytest.fixture(scope="module", params=list(TOKENS))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("documents")
    checkpoint = save_checkpoint(path, TOKENS[request.param])
    with engine(checkpoint, max_num_batched_tokens=CHUNK, max_model_len=4096) as llm:
        yield Served(llm, Reference(checkpoint))


@pytest.fixture(scope="module", params=[True, False], ids=["many tiles", "one tile"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """An engine that has compiled what requests need, whose processor makes many tiles or one."""
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("compiled"), idefics3.TOKENS)
    unasked = {"do_image_splitting": request.param}
    torch._dynamo.reset()
    with engine(
        checkpoint, max_model_len=4096, enforce_eager=False, mm_processor_kwargs=unasked
    ) as llm:
        yield Served(llm, Reference(checkpoint))


def check(served: Served, ask: Ask) -> None:
    """The answer and the features are those of Transformers."""
    (output,) = served.llm.generate([ask.prompt], greedy(MAX_TOKENS), use_tqdm=False)
    answer, images = output.outputs[0], list(ask.images)
    assert list(answer.token_ids) == served.reference.generate(ask.text, images, MAX_TOKENS)
    features = served.reference.features(ask.text, images)
    assert relative_error(answer.mm_embedding, features) < 1e-4


PAGES = (picture(90, 120), picture(120, 90), picture(100, 100))


def test_several_pages_of_many_tiles(served: Served) -> None:
    check(served, Ask("What is on these pages?", PAGES))


def test_a_page_alone_and_again_from_the_caches(served: Served) -> None:
    for _ in range(2):
        check(served, Ask("What is on the page?", PAGES[:1]))


@pytest.mark.parametrize("size", [(400, 10), (10, 400)], ids=str)
def test_a_strip_beside_a_page(served: Served, size: tuple[int, int]) -> None:
    check(served, Ask("What is it?", (picture(*size), PAGES[0])))


def test_what_comes_back_says_the_grid_of_tiles_and_of_features_in_each(served: Served) -> None:
    ask = Ask("What is on these pages?", PAGES)
    (output,) = served.llm.generate([ask.prompt], greedy(1), use_tqdm=False)
    layouts = [item.layout for item in output.outputs[0].mm_embedding_info.items]
    grids = [layout.fine for layout in layouts]
    assert [grid.tile for grid in grids] == [4, 4, 4]
    assert [(grid.rows, grid.columns) for grid in grids] == [(16, 12), (12, 16), (16, 16)]
    assert [layout.num_features for layout in layouts] == [13 * 16, 13 * 16, 17 * 16]
    assert [(layout.base.start, layout.base.rows) for layout in layouts] == [
        (layout.num_features - 16, 4) for layout in layouts
    ]


def test_pooled_rows_are_those_of_the_places(served: Served) -> None:
    """A cell of the grid of a page's tiles is the mean of the features of that tile."""
    ask = Ask("What is on the page?", PAGES[:1])
    choice = {"pooling": "grid", "grid": [4, 3], "dtype": "float32"}
    params = greedy(1, extra_args={"return_mm_embedding": choice})
    (output,) = served.llm.generate([ask.prompt], params, use_tqdm=False)
    features = served.reference.features(ask.text, list(ask.images))
    tiles = features[: 12 * 16].view(12, 16, -1).mean(dim=1)
    assert relative_error(output.outputs[0].mm_embedding, tiles) < 1e-4


def test_a_chunk_may_end_anywhere_in_an_image(served: Served) -> None:
    """In front of the first feature, inside a tile, inside the tokens between two of them."""
    ends = set()
    for padding in range(45, 65):
        ask = Ask("What is it?", PAGES[:1])
        text = "." * padding + ask.text
        prompt = {"prompt": text, "multi_modal_data": {"image": list(ask.images)}}
        (output,) = served.llm.generate([prompt], greedy(2), use_tqdm=False)
        answer = output.outputs[0]
        expected = served.reference.generate(text, list(ask.images), 2)
        assert list(answer.token_ids) == expected, padding
        assert len(answer.mm_embedding) == 13 * 16
        ends |= ends_of_chunks(output.prompt_token_ids)
    assert ends == {"before the first feature", "in a tile", "between tiles"}


def test_the_warmups_graphs_serve_pages_of_one_tile_and_of_many(compiled: Served) -> None:
    reference, ask = compiled.reference, Ask("What is it?", PAGES[:2])
    given = {"text": ask.text, "images": list(PAGES[:2]), "return_tensors": "pt"}
    for tiles, kwargs in {
        2: {"do_image_splitting": False},
        13 + 13: {"do_image_splitting": True},
        5 + 5: {"do_image_splitting": True, "size": {"longest_edge": 128}},
    }.items():
        inputs = reference.processor(**given, **kwargs)
        assert inputs["pixel_values"].shape[1] == tiles
        expected = reference.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        prompt = {**ask.prompt, "mm_processor_kwargs": kwargs}
        with nothing_compiled():
            (output,) = compiled.llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        answer = list(output.outputs[0].token_ids)
        assert answer == expected[0, len(output.prompt_token_ids) :].tolist()


def ends_of_chunks(token_ids: list[int]) -> set[str]:
    """Where the chunks of a prompt end, of those that end in its image.

    The image begins and ends with a token that stands nowhere else in a prompt of one picture but
    in front of its tiles.
    """
    is_feature = [token_id == IMAGE for token_id in token_ids]
    first = is_feature.index(True)
    last = len(token_ids) - 1 - is_feature[::-1].index(True)
    start = token_ids.index(idefics3.FIRST_TOKEN_ID)
    ends = set()
    for end in range(CHUNK, len(token_ids), CHUNK):
        before, after = is_feature[end - 1], is_feature[end]
        if start < end <= first:
            ends.add("before the first feature")
        elif first < end <= last and before and after:
            ends.add("in a tile")
        elif first < end <= last and not before and not after:
            ends.add("between tiles")
    return ends
