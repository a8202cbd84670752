# SPDX-License-Identifier: Apache-2.0
"""The page that goes through vLLM's features says what becomes of each of their flags."""

import re
import shlex
from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

PAGE = Path(__file__).parents[3] / "docs" / "features.md"

WORKS = ("yes", "passes", "no effect")
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| (?:`([^|]+)` )?\|", re.M)

ROWS = [match for match in ROW.findall(PAGE.read_text()) if not match[1].startswith(("here", "-"))]
FLAGS = [(here, flags) for _, here, flags in ROWS if flags]


def configure(checkpoint: Path, flags: str) -> VllmConfig:
    """The configuration of a server that is started with some flags."""
    parser = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(parser)
    arguments = parser.parse_args(["--model", str(checkpoint), *shlex.split(flags)])
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()


def test_every_row_says_whether_it_works() -> None:
    assert len(ROWS) > 40
    assert len(FLAGS) > 30
    assert {here for _, here, _ in ROWS} == {*WORKS, "no"}


@pytest.mark.parametrize(("here", "flags"), FLAGS, ids=[flags for _, flags in FLAGS])
def test_a_flag_is_taken_or_refused_as_the_page_says(
    demo_checkpoint: Path, here: str, flags: str
) -> None:
    if here in WORKS:
        assert configure(demo_checkpoint, flags).parallel_config.worker_cls.endswith("SpyreWorker")
        return
    with pytest.raises(ValueError, match=r"not supported on (Spyre|current platform)"):
        configure(demo_checkpoint, flags)
