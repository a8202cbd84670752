# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: the site is made of the pages of the repository as they are.

The pages are written to be read in the repository, so three things are done on the way: pages that
stand beside ``docs/`` are taken in under a name of their own, links go to where their target is on
the site (and are left out, with their text kept, where it is not on it), and headings get the
anchors by which the repository links them. On the pages of the reference, ``<!-- help: NAME -->``
is replaced by the help of a command.
"""

import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

BESIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/results.md": "benchmarks/results.md",
}
"""Pages that do not stand in ``docs/``: by their path in the repository, that on the site."""

PICTURES, PICTURE = "benchmarks", ".png"
"""Folder whose pictures these pages show, beside those of ``docs/``, and the suffix of them."""

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
HELP = re.compile(r"^<!-- help:(?P<command>[\w ]*) -->$", re.M)
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor that a repository's pages give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site; None if it is not on it."""
    if path in BESIDE:
        return BESIDE[path]
    folder, _, name = path.partition("/")
    if folder == "docs" and name.endswith((".md", PICTURE)):
        return name
    return path if folder == PICTURES and path.endswith(PICTURE) else None


def repository_path(path: str) -> str:
    """Where a page or a picture of the site is in the repository."""
    if path.startswith(f"{PICTURES}/") and path.endswith(PICTURE):
        return path
    beside = {on_site: source for source, on_site in BESIDE.items()}
    return beside.get(path, f"docs/{path}")


def with_links_of_the_site(markdown: str, page: str) -> str:
    """A page with its links as the site needs them.

    Args:
        markdown: text of the page.
        page: its path on the site.
    """
    source = posixpath.dirname(repository_path(page))

    def replaced(match: re.Match[str]) -> str:
        path, mark, fragment = match["target"].partition("#")
        if not path or "://" in path:
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(source, path)))
        if target is None:
            return match["text"]
        link = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({link}{mark}{fragment})"

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(replaced, markdown[end:])])


def help_of(command: str) -> str:
    """What a subcommand of ``vllm-spyre-mm`` prints for ``--help``, as a block of a page."""
    run = [sys.executable, "-m", "vllm_spyre_mm.cli", *command.split(), "--help"]
    done = subprocess.run(
        run,
        cwd=ROOT,
        env={"COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```\n{done.stdout.rstrip()}\n```"


# -- hooks of mkdocs ------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Have headings get the repository's anchors."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    """Take in the pages and pictures that do not stand in ``docs/``."""
    from mkdocs.structure.files import File

    pictures = sorted((ROOT / PICTURES).glob("*.png"))
    paths = {
        **BESIDE,
        **{f"{PICTURES}/{each.name}": f"{PICTURES}/{each.name}" for each in pictures},
    }
    for source, on_site in paths.items():
        files.append(File.generated(config, on_site, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Give a page the site's links, and the help of commands."""
    markdown = with_links_of_the_site(markdown, page.file.src_uri)
    return HELP.sub(lambda match: help_of(match["command"]), markdown)
