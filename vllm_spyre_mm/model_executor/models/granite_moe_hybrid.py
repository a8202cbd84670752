# SPDX-License-Identifier: Apache-2.0
"""The dense models of ``granitemoehybrid`` (Granite 4 micro): Granite with tensors of other names.

FMS has the model, but its adapter pads no heads. Here the tensors get Granite's names, and go on to
the adapter that Granite has here.
"""

from collections.abc import Mapping
from typing import Any

from fms.models.hf.config_utils import param_builders
from fms.utils import serialization

from vllm_spyre_mm.model_executor.models.names import renamed

ARCHITECTURE = "spyre_mm_granite_moe_hybrid"
"""FMS's name of the architecture, by which its adapter is found."""

WIDTH = "shared_intermediate_size"
"""The configuration's name of the feed-forward width; ``intermediate_size`` is the experts'."""


def params(text: Any) -> dict[str, Any]:
    """FMS's parameters, with the width of the feed-forward layers that dense models have."""
    built = param_builders.build_granite_moe_hybrid_params(text)
    built["hidden_grow_factor"] = getattr(text, WIDTH) / text.hidden_size
    return built


def mismatch(text: Any, name: str) -> str | None:
    """First property that makes a model no dense one with RoPE, or None.

    Args:
        text: the Transformers configuration.
        name: put before the property, for the reason.
    """
    if text.num_local_experts:
        return (
            f"{name}num_local_experts {text.num_local_experts}: only dense models are implemented"
        )
    if text.position_embedding_type != "rope":
        return (
            f"{name}position_embedding_type {text.position_embedding_type!r} is not implemented, "
            "only 'rope'"
        )
    return None


# -- serialisation --------------------------------------------------------------------------------

NAMES = (
    (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
    (r"\.shared_mlp\.input_linear\.", ".mlp.gate_proj."),
)


def _adapt(input_sd: Mapping[str, Any], **kwargs: Any) -> Mapping[str, Any]:
    """Rename tensors, divide the two that are stored as one, and give them to Granite's adapter."""
    granites: dict[str, Any] = {}
    for name, tensor in input_sd.items():
        ours = renamed(name, NAMES)
        if ".gate_proj." in ours:
            granites[ours], granites[ours.replace("gate_proj", "up_proj")] = tensor.chunk(2, dim=0)
        else:
            granites[ours] = tensor
    return serialization.get_adapted("llava_next", "hf", granites, kwargs)


serialization.register_adapter_step(ARCHITECTURE, "adapt_granite_moe_hybrid", _adapt)
serialization.register_adapter(ARCHITECTURE, "hf", ["adapt_granite_moe_hybrid"])
