# SPDX-License-Identifier: Apache-2.0
"""Commands for a model of Transformers."""

import time
from typing import Any

from workload import PROMPT, QUESTION, SIDES, picture


class Transformers:
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
        self._processor = AutoProcessor.from_pretrained(model)
        self._model = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=dtype).eval()
        if engine.get("compile"):
            torch._inductor.config.freezing = True
            self._model.model.vision_tower.compile()
            self._model.model.language_model.compile(dynamic=True)

    def close(self) -> None:
        """Nothing outlives this process."""

    def workload(
        self, requests: int, max_tokens: int, seed: int, sides: tuple[int, int] = SIDES
    ) -> dict[str, Any]:
        """As :meth:`vllm_engine.Vllm.workload`."""
        import torch

        pictures = [picture(seed + i, sides) for i in range(requests)]
        started = time.perf_counter()
        for each in pictures:
            prompt = PROMPT.format(question=QUESTION)
            inputs = self._processor(text=prompt, images=each, return_tensors="pt")
            with torch.no_grad():  # Inductor does not freeze what inference mode made
                self._model.generate(
                    **inputs, max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False
                )
        return {
            "seconds": time.perf_counter() - started,
            "prompt_tokens": inputs["input_ids"].shape[1],
        }

    def tower(self, tiles: int, repeats: int) -> dict[str, Any]:
        """Seconds of the vision tower and the projector, for so many tiles."""
        import torch

        model, config = self._model.model, self._model.config
        side = config.vision_config.image_size
        pixels = torch.randn(tiles, 3, side, side).to(self._model.dtype)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            with torch.no_grad():
                hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states
                model.multi_modal_projector(hidden[config.vision_feature_layer][:, 1:])
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}
