# SPDX-License-Identifier: Apache-2.0
"""Makes a picture that Pillow refuses the client's error, also where it is a decompression bomb.

Leans on: ``ImageMediaIO.load_bytes`` decodes every picture that comes as bytes (over HTTP, from a
file), and a ValueError from it is answered with HTTP 400. vLLM turns OSError into one; what Pillow
raises for a bomb, and from within damaged files, is none and would be answered with HTTP 500 or
501.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.vllm_hooks.contract import require_attributes, require_parameters
from vllm_spyre_mm.vllm_hooks.module_loading import when_loaded


def install() -> None:
    """Extend vLLM's picture loader as soon as it exists."""
    when_loaded("vllm.multimodal.media.image", _extend_image_loader)


def _extend_image_loader(module: ModuleType) -> None:
    require_attributes(module, ("ImageMediaIO",))
    loader = module.ImageMediaIO
    if hasattr(loader.load_bytes, "__wrapped__"):
        return
    require_parameters(loader.load_bytes, ("data",))
    loader.load_bytes = _refusing(loader.load_bytes)


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_bytes(self: Any, data: bytes) -> Any:
        try:
            return original(self, data)
        except (ValueError, MemoryError):
            raise  # vLLM's own sentence; what no picture is to blame for
        except Exception as error:
            # Nothing but the client's bytes is worked on here, and there is no end to what
            # Pillow's decoders raise for damaged ones: RuntimeError, TypeError, AttributeError...
            raise ValueError(f"Failed to load image: {error}") from error

    return load_bytes
