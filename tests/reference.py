# SPDX-License-Identifier: Apache-2.0
"""The reference: Transformers on the same checkpoint, one request at a time."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from tests.checkpoints import model_class


class Reference:
    """A model as Transformers runs it.

    Args:
        checkpoint: folder in the Hugging Face layout.
        dtype: of the computation.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        config = AutoConfig.from_pretrained(checkpoint)
        takes_pictures = hasattr(config, "vision_config")
        auto_processor = AutoProcessor if takes_pictures else AutoTokenizer
        self.processor: Any = auto_processor.from_pretrained(checkpoint)
        self.model = model_class(config).from_pretrained(checkpoint, dtype=dtype)
        self.model.eval()

    @property
    def logits_scaling(self) -> float:
        """What the decoder divides its logits by and this model does not.

        In Transformers 5 the head of a multimodal model is outside its decoder, and Granite's
        ``logits_scaling`` is lost. FMS and vLLM's own Granite apply it; greedy tokens do not depend
        on it.
        """
        text = self.model.config.get_text_config()
        if text is self.model.config:
            return 1.0
        return getattr(text, "logits_scaling", 1.0)

    def inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the processor makes of a prompt and its images."""
        if not images:
            return self.processor(text=prompt, return_tensors="pt")
        return self.processor(text=prompt, images=images, return_tensors="pt")

    @torch.inference_mode()
    def generate(self, prompt: str, images: list[Image.Image], max_tokens: int) -> list[int]:
        """Greedy tokens, the end-of-sequence token included."""
        inputs = self.inputs(prompt, images)
        tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def certain_tokens(
        self, prompt: str, images: list[Image.Image], max_tokens: int, margin: float
    ) -> list[int]:
        """Greedy tokens before the first that leads by less than ``margin``, in logits."""
        generated = self.model.generate(
            **self.inputs(prompt, images),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        certain = []
        for logits in generated.logits:
            best, second = logits[0].topk(2).values
            if best - second < margin:
                break
            certain.append(int(logits[0].argmax()))
        return certain

    @torch.inference_mode()
    def logits(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Logits of the first generated token, ``(vocab_size,)``; see :attr:`logits_scaling`."""
        logits = self.model(**self.inputs(prompt, images)).logits[0, -1].float()
        return logits / self.logits_scaling

    @torch.inference_mode()
    def features(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Features of all images in order, ``(num_features, hidden_size)``."""
        inputs = self.inputs(prompt, images)
        given = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        return torch.cat(list(self.model.get_image_features(**given).pooler_output))
