# SPDX-License-Identifier: Apache-2.0
"""The commands of the tutorial, in its order, in a shell; the server is the one that it starts."""

from pathlib import Path

from PIL import Image

from tests.e2e.pages import DOCS, Page, page_server, run_script
from vllm_spyre_mm.demo import checkpoint_path

PAGE = Page.of("tutorial.md")


def test_every_block_of_the_page_is_executed_or_compared() -> None:
    kinds = [kind for kind, _ in PAGE.every_block]
    assert PAGE.text.count("```") == 2 * len(kinds)
    assert kinds.count("runnable") == 4


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    with page_server(PAGE, checkpoint_path(), tmp_path) as server:
        printed = run_script(PAGE.script(server.address), tmp_path)
    (expected,) = PAGE.blocks("printed")
    assert printed.endswith(expected)
    assert ": 0 errors, " in printed
    assert "GraniteVision" in printed
    drawn = Image.open(tmp_path / "features.png")
    assert drawn.size == Image.open(DOCS / "features.png").size
    assert (tmp_path / "features-00001.safetensors").exists()
