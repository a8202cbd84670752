# SPDX-License-Identifier: Apache-2.0
"""A small Granite Vision checkpoint that answers questions about drawn pictures.

It stands in for a real checkpoint wherever none can be downloaded: in tests, in the demo and in
examples. `vllm_spyre_mm.demo.pictures` draws the pictures and knows the right answers.
"""

from pathlib import Path

__all__ = ["checkpoint_path"]


def checkpoint_path() -> Path:
    """Folder of the embedded checkpoint, in the Hugging Face layout."""
    return Path(__file__).resolve().parent / "tiny_granite_vision"
