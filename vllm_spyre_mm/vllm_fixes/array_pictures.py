# SPDX-License-Identifier: Apache-2.0
"""Takes arrays and nested lists for the pictures that they are.

Leans on: ``MultiModalDataParser._parse_image_data`` is given all images of a prompt, and takes an
array for a picture as it is. The processors then guess which axis holds the channels, each in its
own way, and print the pixels where they cannot.
"""

from types import ModuleType
from typing import Any

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded


def install() -> None:
    """Extend vLLM's parser as soon as it exists."""
    when_loaded("vllm.multimodal.parse", _extend_parser)


def _extend_parser(module: ModuleType) -> None:
    require_attributes(module, ("MultiModalDataParser",))
    parser = module.MultiModalDataParser
    require_attributes(parser, ("_parse_image_data",))
    original = parser._parse_image_data
    if is_extended(original, __name__):
        return
    require_parameters(original, ("data",))

    from vllm_spyre_mm.multimodal.pictures import as_pictures

    @extending(original, __name__)
    def _parse_image_data(self: Any, data: Any) -> Any:
        return original(self, as_pictures(data))

    parser._parse_image_data = _parse_image_data
