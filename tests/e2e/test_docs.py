# SPDX-License-Identifier: Apache-2.0
"""The pages say what the code does: their scripts run, their links lead somewhere, and every
message of the package is on the page about troubleshooting."""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_spyre_mm.config import NOT_FOR_USERS, SpyreSettings
from vllm_spyre_mm.demo.pictures import Shape, draw_picture
from vllm_spyre_mm.frontend.flags import TABLE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_spyre_mm"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


SHAPES = [Shape("circle", "red", "top left")]
ANSWER = "a red circle at the top left"


def by_name(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


# -- scripts ------------------------------------------------------------------------------------

BLOCK = re.compile(
    r"^(?P<mark><!-- runnable -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.M | re.S
)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Python blocks of a page, with whether each is marked as runnable."""
    return [
        (match["mark"] is not None, textwrap.dedent(match["code"]))
        for match in BLOCK.finditer(page.read_text())
    ]


def runnable(page: Path) -> list[str]:
    return [code for is_marked, code in blocks(page) if is_marked]


def run_script(folder: Path, code: str) -> str:
    draw_picture(SHAPES, (192, 144)).image.save(folder / "picture.png")
    script = folder / "script.py"
    script.write_text(code)
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert finished.returncode == 0, f"{finished.stderr[-4000:]}\n{code}"
    return finished.stdout


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_python_blocks_are_python(page: Path) -> None:
    for _, code in blocks(page):
        ast.parse(code)


def test_the_scripts_of_the_readme_and_of_returning_embeddings(tmp_path: Path) -> None:
    """The page goes on from the README's script, so both run in one engine; as they stand, with
    the backend that a user gets."""
    (script,) = runnable(README)
    assert script.rstrip().splitlines()[-1].startswith("    ")  # below the guard
    more = runnable(DOCS / "returning-embeddings.md")
    assert len(more) > 3
    below = "".join(textwrap.indent(code, "    ") + "\n" for code in more)
    printed = run_script(tmp_path, f"{script}\n{below}    print('the end')\n")
    assert f"\n{ANSWER}\n" in printed
    assert "torch.Size([" in printed
    assert "\nthe end\n" in printed


def test_the_streaming_script(tmp_path: Path) -> None:
    (script,) = (code for _, code in blocks(DOCS / "returning-embeddings.md") if "AsyncLLM" in code)
    argument = "enable_return_mm_embedding=True"
    assert script.count(argument) == 1
    printed = run_script(tmp_path, script.replace(argument, f"{argument}, enforce_eager=True"))
    assert f"{ANSWER}torch.Size([" in printed


# -- links and addresses ------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Fragments that lead to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_machine_and_no_host_is_named(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?<![\w.…*])/(?:home|mnt|opt|root|srv|tmp|usr|var|work)/\S*", text)
    assert set(re.findall(r"https?://([^/:\s)\"]+)", text)) <= {"localhost"}
    assert not re.findall(r"\b(?:[\w-]+\.)+(?:com|dev|io|net|org)\b", text)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=by_name)
def test_the_readme_links_every_page(page: Path) -> None:
    assert f"(docs/{page.name})" in README.read_text()


# -- settings and messages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in SpyreSettings.model_fields if name not in NOT_FOR_USERS]
)
def test_settings_are_described(name: str) -> None:
    assert f"| `{name}` |" in (DOCS / "settings.md").read_text()
    assert f"| `{name}` |" in README.read_text()


PLACEHOLDER = "…"


def template(node: ast.expr | None, constants: dict[str, ast.expr]) -> str:
    """A message with its placeholders as the pages write them; empty if it is no literal."""
    if isinstance(node, ast.FormattedValue):
        return template(node.value, constants) or PLACEHOLDER
    if isinstance(node, ast.Name):
        return template(constants.get(node.id), {})
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", PLACEHOLDER, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    return ""


def characteristic_words(message: str) -> str:
    """The first five words of the first clause that has four without a placeholder, or else of the
    whole message."""
    message = re.sub(f"{PLACEHOLDER}+", PLACEHOLDER, plain(message))
    clauses = re.split(rf"{PLACEHOLDER}\S*|[;:,(] ?", message)
    long = [clause.split() for clause in clauses if len(clause.split()) >= 4]
    if long:
        return " ".join(long[0][:5]).strip(".)")
    return message.partition(" (")[0].strip(f"{PLACEHOLDER}:; ")


def plain(text: str) -> str:
    """Text without markup and line breaks."""
    return " ".join(text.replace("`", "").split())


def calls_with_messages(tree: ast.AST) -> Iterator[ast.Call]:
    """What raises, what ends the command line's parser, and what is logged for the user to act."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func) in ("logger.warning", "logger.error", "parser.error")
        ):
            yield node


def messages() -> Iterator[str]:
    """Characteristic words of each message of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        constants = {
            ast.unparse(node.targets[0]): node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
        }
        for call in calls_with_messages(tree):
            message = template(call.args[0] if call.args else None, constants)
            assert message, f"{file.name}:{call.lineno} has no message that can be looked up"
            # Pictures that do not fit their features are an error of whoever calls the colouring.
            if file.name != "coloring.py":
                yield characteristic_words(message)


@pytest.mark.parametrize("words", sorted(set(messages())))
def test_messages_are_explained(words: str) -> None:
    assert len(words) >= 12
    assert words in plain((DOCS / "troubleshooting.md").read_text())


def refusals() -> list[str]:
    """What is not supported of vLLM's flags, as the table names it."""
    return [
        re.split(r"\{| \(|:", refused.what)[0]
        for decisions in TABLE
        for refused in decisions.refused
    ]


@pytest.mark.parametrize("name", sorted({*refusals()}))
def test_refusals_are_listed(name: str) -> None:
    assert name in plain((DOCS / "troubleshooting.md").read_text())
