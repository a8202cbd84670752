# SPDX-License-Identifier: Apache-2.0
"""Commands for a model that OpenVINO runs, converted by Optimum Intel."""

from pathlib import Path
from typing import Any

from generation import GeneratingModel

CONVERTED = "openvino"
"""Folder of the converted model, in that of the checkpoint."""


class OpenVino(GeneratingModel):
    """One request after the other.

    Weights are kept in the checkpoint's 16 bits; OpenVINO computes in bf16 where the CPU has it.

    Args:
        model: folder of the checkpoint; it is converted once, which takes minutes.
        engine: not used.
    """

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        from optimum.exporters.openvino import main_export
        from optimum.intel.openvino import OVModelForVisualCausalLM
        from transformers import AutoProcessor

        converted = Path(model) / CONVERTED
        if not (converted / "done").is_file():
            main_export(
                model, output=converted, task="image-text-to-text", library_name="transformers"
            )
            (converted / "done").touch()
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = OVModelForVisualCausalLM.from_pretrained(converted, device="CPU")

    def generate(self, **inputs: Any) -> Any:
        return self.model.generate(**inputs)

    def encode(self, pixels: Any) -> Any:
        return self.model.vision_embeddings(pixels).last_hidden_state
