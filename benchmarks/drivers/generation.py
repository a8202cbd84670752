# SPDX-License-Identifier: Apache-2.0
"""Commands for models with a ``generate`` as Transformers' have, which OpenVINO's have too."""

import time
from abc import abstractmethod
from typing import Any

from workload import PROMPT, QUESTION, SIDES, picture


class GeneratingModel:
    """One request after the other.

    Attributes:
        processor: Transformers' processor of the checkpoint.
        model: has ``config.vision_config``.
    """

    processor: Any
    model: Any

    def close(self) -> None:
        """Nothing outlives this process."""

    @abstractmethod
    def generate(self, **inputs: Any) -> Any:
        """Tokens ``(1, prompt and answer)`` of the model's ``generate``."""

    @abstractmethod
    def encode(self, pixels: Any) -> Any:
        """Features of ``(tiles, 3, side, side)``: the vision tower and the projector."""

    def workload(
        self, requests: int, max_tokens: int, seed: int, sides: tuple[int, int] = SIDES
    ) -> dict[str, Any]:
        """As :meth:`vllm_engine.Vllm.workload`."""
        pictures = [picture(seed + i, sides) for i in range(requests)]
        started = time.perf_counter()
        for each in pictures:
            prompt = PROMPT.format(question=QUESTION)
            inputs = self.processor(text=prompt, images=each, return_tensors="pt")
            generated = self.generate(
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

        side = self.model.config.vision_config.image_size
        pixels = torch.randn(tiles, 3, side, side)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            features = self.encode(pixels)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds, "shape": list(features.shape)}
