# SPDX-License-Identifier: Apache-2.0
"""The recipes do what their page says: pages to text over HTTP, and a search among pictures."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import docling
from tests.e2e.engines import relative_error
from tests.e2e.pages import ADDRESS, DOCS, Page, page_server, run_script
from tests.e2e.server_embeddings.requests import post
from tests.e2e.serving import EXACT, data_url
from tests.reference import Reference
from vllm_spyre_mm.payload import decode_mm_embedding

DOCUMENTS, SEARCH = Page.of("recipes.md", "Documents"), Page.of("recipes.md", "Picture search")
PAGES = ("page-1.png", "page-2.png")


@pytest.mark.parametrize("part", [DOCUMENTS, SEARCH])
def test_every_block_is_executed_or_compared(part: Page) -> None:
    assert part.text.count("```") == 2 * len(part.every_block)
    assert Page.of("recipes.md").every_block == DOCUMENTS.every_block + SEARCH.every_block


# -- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """The part about documents, done.

    Attributes:
        folder: in which it was done.
        printed: what its commands printed.
        address: of its server.
        checkpoint: of the model.
    """

    folder: Path
    printed: str
    address: str
    checkpoint: Path


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    folder = tmp_path_factory.mktemp("documents")
    checkpoint = docling.save_checkpoint(folder / "model")
    more = (*EXACT, "--enable-return-mm-embedding")
    with page_server(DOCUMENTS, checkpoint, folder, *more) as server:
        printed = run_script(DOCUMENTS.script(server.address), folder)
        yield Read(folder, printed, server.address, checkpoint)


def counted(printed: str) -> list[tuple[int, int]]:
    """The number of pages of each request, and the tokens of its prompt."""
    lines = re.findall(r"^(.*): (\d+) tokens read, \d+ written$", printed, re.M)
    return [(names.count(".png"), int(tokens)) for names, tokens in lines]


def test_each_page_becomes_a_document_with_its_tags(read: Read) -> None:
    for page in PAGES:
        assert (read.folder / page).with_suffix(".doctags").read_text() == docling.DOCUMENT


def test_a_stop_token_ends_a_text_without_tags(read: Read) -> None:
    assert f"\n{docling.TEXT}\n" in read.printed
    assert read.printed.count(docling.DOCUMENT) == 2  # of those that are printed, not written


def test_a_page_has_13_tiles_or_one(read: Read) -> None:
    reference, tag = Reference(read.checkpoint), "<image>\n"
    pages = [Image.open(read.folder / page) for page in PAGES]

    def tokens(prompt: str, number: int) -> tuple[int, int]:
        text = f"<|user|>\n{tag * number}{prompt}\n<|assistant|>\n"
        return number, reference.inputs(text, pages[:number])["input_ids"].shape[1]

    convert = tokens("Convert this page to docling.", 1)
    *several, one_tile = counted(read.printed)
    both = tokens("Which of these pages has open questions?", 2)
    assert several == [convert, convert, convert, both]
    side = 4  # features on the side of a tile
    assert convert[1] > 13 * side**2
    assert side**2 < one_tile[1] < 3 * side**2


def test_features_come_back_tile_by_tile(read: Read) -> None:
    page = (read.folder / PAGES[0]).read_bytes()
    part = {"type": "image_url", "image_url": {"url": data_url(page)}}
    status, answer = post(read.address, {"input": [part]})
    assert status == 200
    reference = Reference(read.checkpoint)
    expected = reference.features("<image>", [Image.open(read.folder / PAGES[0])])
    assert relative_error(decode_mm_embedding(answer["mm_embedding"]), expected) < 1e-4


def test_without_special_tokens_the_words_come_back_alone(read: Read) -> None:
    """Nor is the stop string found: the model's own end is."""
    (script,) = DOCUMENTS.blocks("file read_pages.py")
    assert script.count('"skip_special_tokens": False, ') == 1
    script = script.replace('"skip_special_tokens": False, ', "").replace(ADDRESS, read.address)
    (read.folder / "read_without.py").write_text(script)
    ask = "from read_without import ask; print(ask('What?', 'page-1.png'))"
    printed = run_script(f'python -c "{ask}"', read.folder)
    assert printed.endswith(f" {len(docling.TAGS) + 4} written\n{docling.TEXT}\n")


def test_a_document_that_is_cut_off_is_an_error(read: Read) -> None:
    (script,) = DOCUMENTS.blocks("file read_pages.py")
    short = script.replace("max_tokens=4096", "max_tokens=5").replace(ADDRESS, read.address)
    assert short.count("max_tokens=5") == 1
    (read.folder / "read_short.py").write_text(short)
    printed = run_script("python read_short.py page-1.png 2>&1 || true", read.folder)
    assert "cut off after 5 tokens" in printed


# -- picture search -------------------------------------------------------------------------------


def test_the_search_finds_what_the_page_says(tmp_path: Path) -> None:
    printed = run_script(SEARCH.script(), tmp_path)
    (expected,) = SEARCH.blocks("printed")
    line = re.compile(r"^(\d\.\d\d) (pictures/\S+)$", re.M)
    found, said = line.findall(printed), line.findall(expected)
    assert [path for _, path in found] == [path for _, path in said]
    for (ours, _), (theirs, _) in zip(found, said, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.02)
    assert len(list((tmp_path / "pictures").iterdir())) == 64
    drawn, shown = (np.asarray(Image.open(folder / "similar.png")) for folder in (tmp_path, DOCS))
    assert drawn.shape == shown.shape
    assert np.abs(drawn.astype(int) - shown).mean() < 1  # of 255: the dtype is the host's
