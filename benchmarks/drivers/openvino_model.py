# SPDX-License-Identifier: Apache-2.0
"""Commands for a model that OpenVINO runs, converted by Optimum Intel."""

import time
from pathlib import Path
from typing import Any

from workload import PROMPT, QUESTION, SIDES, picture

CONVERTED = "openvino"
"""Folder of the converted model, in that of the checkpoint."""


class OpenVino:
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
        self._processor = AutoProcessor.from_pretrained(model)
        self._model = OVModelForVisualCausalLM.from_pretrained(converted, device="CPU")

    def close(self) -> None:
        """Nothing outlives this process."""

    def workload(
        self, requests: int, max_tokens: int, seed: int, sides: tuple[int, int] = SIDES
    ) -> dict[str, Any]:
        """As :meth:`vllm_engine.Vllm.workload`."""
        pictures = [picture(seed + i, sides) for i in range(requests)]
        started = time.perf_counter()
        for each in pictures:
            prompt = PROMPT.format(question=QUESTION)
            inputs = self._processor(text=prompt, images=each, return_tensors="pt")
            generated = self._model.generate(
                **inputs, max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False
            )
        return {
            "seconds": time.perf_counter() - started,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "tokens": generated[0, inputs["input_ids"].shape[1] :].tolist(),
        }

    def tower(self, tiles: int, repeats: int) -> dict[str, Any]:
        """Seconds of the vision tower and the projector, for so many tiles."""
        import torch

        side = self._model.config.vision_config.image_size
        pixels = torch.randn(tiles, 3, side, side)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            features = self._model.vision_embeddings(pixels)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "shape": list(features.last_hidden_state.shape)}
