# SPDX-License-Identifier: Apache-2.0
"""The reference: Transformers on the same checkpoint, one request at a time.

What it computes is kept in a folder, by a hash of the checkpoint, the request and the software.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from tests import kept
from tests.checkpoints import model_class


class Reference:
    """A model as Transformers runs it.

    Args:
        checkpoint: folder in the Hugging Face layout.
        dtype: of the computation.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.config = AutoConfig.from_pretrained(checkpoint)
        takes_pictures = hasattr(self.config, "vision_config")
        auto_processor = AutoProcessor if takes_pictures else AutoTokenizer
        self.processor: Any = auto_processor.from_pretrained(checkpoint)
        self.kept = kept.Kept(
            kept.FOLDER,
            kept.digest_of_files(checkpoint),
            kept.digest_of_software(),
            str(dtype),
            Path(__file__).read_text(),
        )

    @cached_property
    def model(self) -> Any:
        """The model, loaded when something is computed that was not kept."""
        model = model_class(self.config).from_pretrained(self.checkpoint, dtype=self.dtype)
        return model.eval()

    @property
    def logits_scaling(self) -> float:
        """What the decoder divides its logits by and this model does not.

        In Transformers 5 the head of a multimodal model is outside its decoder, and Granite's
        ``logits_scaling`` is lost. FMS and vLLM's own Granite apply it; greedy tokens do not depend
        on it.
        """
        text = self.config.get_text_config()
        if text is self.config:
            return 1.0
        return getattr(text, "logits_scaling", 1.0)

    def inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the processor makes of a prompt and its images."""
        if not images:
            return self.processor(text=prompt, return_tensors="pt")
        return self.processor(text=prompt, images=images, return_tensors="pt")

    def _once(self, images: list[Image.Image], *key: str, make: Callable[[], Any]) -> Any:
        """What ``make`` computes for a request, now or in an earlier run."""
        with torch.inference_mode():
            return self.kept.get((kept.digest_of_images(images), *key), make)

    def generate(self, prompt: str, images: list[Image.Image], max_tokens: int) -> list[int]:
        """Greedy tokens, the end-of-sequence token included."""

        def make() -> list[int]:
            inputs = self.inputs(prompt, images)
            tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            return tokens[0, inputs["input_ids"].shape[1] :].tolist()

        return self._once(images, "generate", prompt, str(max_tokens), make=make)

    def certain_tokens(
        self, prompt: str, images: list[Image.Image], max_tokens: int, margin: float
    ) -> list[int]:
        """Greedy tokens before the first that leads by less than ``margin``, in logits."""

        def make() -> list[int]:
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

        return self._once(images, "certain", prompt, f"{max_tokens} {margin}", make=make)

    def logits(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Logits of the first generated token, ``(vocab_size,)``; see :attr:`logits_scaling`."""

        def make() -> torch.Tensor:
            logits = self.model(**self.inputs(prompt, images)).logits[0, -1].float()
            return logits / self.logits_scaling

        return self._once(images, "logits", prompt, make=make)

    def features(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """Features of all images in order, ``(num_features, hidden_size)``."""

        def make() -> torch.Tensor:
            inputs = self.inputs(prompt, images)
            names = ("pixel_values", "image_sizes")
            given = {name: inputs[name] for name in names if name in inputs}
            return torch.cat(list(self.model.get_image_features(**given).pooler_output))

        return self._once(images, "features", prompt, make=make)
