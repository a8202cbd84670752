# SPDX-License-Identifier: Apache-2.0
"""Carries the embedding from the engine's process to the front end.

Leans on: ``EngineCoreOutput`` and ``EngineCoreOutputs`` are msgspec structs that travel as arrays,
so that one more field at the end is ignored by a decoder that does not know it and defaults where
it is missing; the front end decodes with the name ``EngineCoreOutputs`` of
``vllm.v1.engine.core_client``; tensors travel as frames of their own.
"""

from types import ModuleType

import msgspec
from vllm.v1.engine import EngineCoreOutput as VllmEngineCoreOutput
from vllm.v1.engine import EngineCoreOutputs as VllmEngineCoreOutputs

from vllm_spyre_mm.scheduler.outputs import EngineCoreOutput, EngineCoreOutputs
from vllm_spyre_mm.upstream.contract import require, require_attributes
from vllm_spyre_mm.upstream.module_loading import when_loaded

REPLACED = ("vllm.v1.engine.core_client.EngineCoreOutputs",)
"""Attributes of vLLM's that are replaced."""


def install() -> None:
    """Let the front end decode the embedding."""
    own, theirs = EngineCoreOutput.__struct_fields__, VllmEngineCoreOutput.__struct_fields__
    require(
        own == (*theirs, "mm_embedding", "mm_embedding_info"),
        "EngineCoreOutput cannot be extended at its end",
    )
    require(
        EngineCoreOutputs.__struct_fields__ == VllmEngineCoreOutputs.__struct_fields__,
        "EngineCoreOutputs cannot be redefined field by field",
    )
    require(
        all(msgspec.structs.fields(cls) for cls in (EngineCoreOutput, EngineCoreOutputs)),
        "EngineCoreOutput is not a msgspec struct",
    )
    when_loaded("vllm.v1.engine.core_client", _decode_with_embedding)


def _decode_with_embedding(module: ModuleType) -> None:
    require_attributes(module, ("EngineCoreOutputs",))
    require(
        module.EngineCoreOutputs in (VllmEngineCoreOutputs, EngineCoreOutputs),
        f"{module.__name__}.EngineCoreOutputs is another class",
    )
    module.EngineCoreOutputs = EngineCoreOutputs  # type: ignore[attr-defined]
