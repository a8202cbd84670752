# SPDX-License-Identifier: Apache-2.0
"""The reference: Transformers on the same checkpoint, one request at a time."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration


class Reference:
    """A model as Transformers runs it.

    Args:
        checkpoint: folder in the Hugging Face layout.
        dtype: of the computation.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
        self.model.eval()

    def inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the processor makes of a prompt and its images."""
        return self.processor(text=prompt, images=images or None, return_tensors="pt")

    @torch.inference_mode()
    def generate(self, prompt: str, images: list[Image.Image], max_tokens: int) -> list[int]:
        """Greedy tokens, the end-of-sequence token included."""
        inputs = self.inputs(prompt, images)
        tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def logits(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Logits of the first generated token, ``(vocab_size,)``.

        In Transformers 5 the head of LLaVA-Next is outside the Granite decoder, and Granite's
        ``logits_scaling`` is lost. FMS and vLLM's own Granite apply it; greedy tokens do not depend
        on it. It is applied here.
        """
        logits = self.model(**self.inputs(prompt, images)).logits[0, -1].float()
        return logits / self.model.config.text_config.logits_scaling

    @torch.inference_mode()
    def features(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Packed features of all images in order, ``(num_features, hidden_size)``."""
        inputs = self.inputs(prompt, images)
        features = self.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        )
        return torch.cat(list(features.pooler_output))
