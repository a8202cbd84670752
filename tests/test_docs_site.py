# SPDX-License-Identifier: Apache-2.0
"""What ``make docs`` makes of the pages: the site has all of them, and its links lead somewhere."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_docs import anchors
from tools import docs_site
from vllm_spyre_mm.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
ON_SITE = {docs_site.site_path(path) for path in docs_site.BESIDE} | {
    str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")
}


def pages(nav: Any) -> list[str]:
    """The pages of a part of the navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    each = nav if isinstance(nav, list) else nav.values()
    return [page for part in each for page in pages(part)]


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(pages(CONFIG["nav"])) == sorted(ON_SITE)


def test_a_warning_is_an_error() -> None:
    assert CONFIG["strict"]
    for kind in ("nav", "links"):
        assert set(CONFIG["validation"][kind].values()) == {"warn"}


@pytest.mark.parametrize("page", sorted(ON_SITE))
def test_links_of_the_site_lead_to_its_pages(page: str) -> None:
    source = ROOT / docs_site.repository_path(page)
    text = docs_site.with_links_of_the_site(source.read_text(), page)
    for match in docs_site.LINK.finditer(docs_site.FENCE.sub("", text)):
        path, _, fragment = match["target"].partition("#")
        target = (Path("/") / Path(page).parent / path).resolve() if path else Path("/") / page
        name = str(target.relative_to("/"))
        in_repository = ROOT / docs_site.repository_path(name)
        if name.endswith(".png"):
            assert in_repository.exists()
        else:
            assert name in ON_SITE
            assert not fragment or fragment in anchors(in_repository)


@pytest.mark.parametrize(
    ("page", "link", "becomes"),
    [
        ("settings.md", "[a](reliability.md#b)", "[a](reliability.md#b)"),
        ("settings.md", "[a](../README.md#b)", "[a](index.md#b)"),
        ("settings.md", "[a](#b)", "[a](#b)"),
        ("settings.md", "[a](../vllm_spyre_mm/config.py)", "a"),
        ("index.md", "[a](docs/settings.md)", "[a](settings.md)"),
        ("index.md", "![a](benchmarks/overview.png)", "![a](benchmarks/overview.png)"),
        ("benchmarks/results.md", "![a](start.png)", "![a](start.png)"),
        ("site/reference.md", "[a](../settings.md)", "[a](../settings.md)"),
        ("recipes.md", "![a](similar.png)", "![a](similar.png)"),
        ("index.md", "![a](docs/similar.png)", "![a](similar.png)"),
        ("index.md", "```\n[a](docs/settings.md)\n```", "```\n[a](docs/settings.md)\n```"),
    ],
)
def test_a_link_leads_where_its_target_is_on_the_site(page: str, link: str, becomes: str) -> None:
    assert docs_site.with_links_of_the_site(link, page) == becomes


def test_headings_have_the_anchors_that_the_pages_link() -> None:
    page = DOCS / "troubleshooting.md"
    headings = [line[4:] for line in page.read_text().splitlines() if line.startswith("### ")]
    assert {docs_site.anchor(heading) for heading in headings} <= anchors(page)


def test_the_reference_has_the_help_of_every_command() -> None:
    markdown = (DOCS / "site" / "reference.md").read_text()
    assert {name.strip() for name in docs_site.HELP.findall(markdown)} == {"", *COMMANDS}
    assert "usage: vllm-spyre-mm embed" in docs_site.help_of("embed")
