# SPDX-License-Identifier: Apache-2.0
"""The connector's settings; what it does is in tests/e2e/test_feature_folder.py."""

import re
from pathlib import Path
from typing import Any

import pytest

from vllm_spyre_mm.scheduler.folder_connector import FolderSettings


def test_settings_are_taken() -> None:
    assert FolderSettings.parse({"folder": "here", "max_bytes": 5}) == FolderSettings(
        folder=Path("here"), max_bytes=5
    )
    assert FolderSettings.parse({"folder": "here"}).max_bytes == 10 << 30


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "folder: Field required"),
        ({"folder": "here", "max_bytes": 0}, "max_bytes: Input should be greater than 0"),
        ({"folder": "here", "path": "there"}, "path: Extra inputs are not permitted"),
    ],
)
def test_settings_that_are_none_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FolderSettings.parse(given)
