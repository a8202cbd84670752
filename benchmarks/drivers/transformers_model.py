# SPDX-License-Identifier: Apache-2.0
"""Commands for a model of Transformers."""

from typing import Any

from generation import GeneratingModel


class Transformers(GeneratingModel):
    """One request after the other.

    Args:
        model: folder of the checkpoint.
        engine: ``dtype`` (fp32 unless given) and ``compile``: the tower and the decoder by
            Inductor, which may rearrange the weights (its freezing).
    """

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        import torch
        from transformers import AutoProcessor, LlavaNextForConditionalGeneration

        dtype = getattr(torch, engine.get("dtype", "float32"))
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=dtype).eval()
        if engine.get("compile"):
            torch._inductor.config.freezing = True
            self.model.model.vision_tower.compile()
            self.model.model.language_model.compile(dynamic=True)

    def generate(self, **inputs: Any) -> Any:
        import torch

        with torch.no_grad():  # Inductor does not freeze what inference mode made
            return self.model.generate(**inputs)

    def encode(self, pixels: Any) -> Any:
        import torch

        model, layer = self.model.model, self.model.config.vision_feature_layer
        with torch.no_grad():
            hidden = model.vision_tower(pixels.to(self.model.dtype), output_hidden_states=True)
            return model.multi_modal_projector(hidden.hidden_states[layer][:, 1:])
