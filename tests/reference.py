# SPDX-License-Identifier: Apache-2.0
"""The reference: Transformers on the same checkpoint, one request at a time.

What it computes is kept in a folder, by a hash of the checkpoint, the request and the software.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from tests import kept
from tests.checkpoints import model_class
from tests.videos import Video


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
        ``logits_scaling`` is lost, but for Granite Vision 4. FMS and vLLM's own Granite apply it;
        greedy tokens do not depend on it.
        """
        text = self.config.get_text_config()
        if text is self.config or self.config.model_type == "granite4_vision":
            return 1.0
        return getattr(text, "logits_scaling", 1.0)

    def inputs(
        self, prompt: str, images: Sequence[Image.Image], videos: Sequence[Video] = ()
    ) -> dict[str, torch.Tensor]:
        """What the processor makes of a prompt, its images and its videos, of all their frames."""
        given: dict[str, Any] = {"images": list(images)} if images else {}
        if videos:
            given["videos"] = [video.frames for video in videos]
            given["video_metadata"] = [
                VideoMetadata(
                    total_num_frames=len(video.frames),
                    fps=video.fps,
                    frames_indices=list(range(len(video.frames))),
                )
                for video in videos
            ]
            given["do_sample_frames"] = False
        return self.processor(text=prompt, return_tensors="pt", **given)

    def _once(
        self,
        images: Sequence[Image.Image],
        videos: Sequence[Video],
        *key: str,
        make: Callable[[], Any],
    ) -> Any:
        """What ``make`` computes for a request, now or in an earlier run."""
        frames = (
            part
            for video in videos
            for part in (kept.digest_of_images(video.images), str(video.fps))
        )
        with torch.inference_mode():
            return self.kept.get((kept.digest_of_images(images), *frames, *key), make)

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        max_tokens: int,
        videos: Sequence[Video] = (),
    ) -> list[int]:
        """Greedy tokens, the end-of-sequence token included."""

        def make() -> list[int]:
            inputs = self.inputs(prompt, images, videos)
            tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            return tokens[0, inputs["input_ids"].shape[1] :].tolist()

        return self._once(images, videos, "generate", prompt, str(max_tokens), make=make)

    def certain_tokens(
        self,
        prompt: str,
        images: Sequence[Image.Image],
        max_tokens: int,
        margin: float,
        videos: Sequence[Video] = (),
    ) -> list[int]:
        """Greedy tokens before the first that leads by less than ``margin``, in logits."""

        def make() -> list[int]:
            generated = self.model.generate(
                **self.inputs(prompt, images, videos),
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

        key = ("certain", prompt, f"{max_tokens} {margin}")
        return self._once(images, videos, *key, make=make)

    def logits(
        self, prompt: str, images: Sequence[Image.Image], videos: Sequence[Video] = ()
    ) -> torch.Tensor:
        """Logits of the first generated token, ``(vocab_size,)``; see :attr:`logits_scaling`."""

        def make() -> torch.Tensor:
            logits = self.model(**self.inputs(prompt, images, videos)).logits[0, -1].float()
            return logits / self.logits_scaling

        return self._once(images, videos, "logits", prompt, make=make)

    def features(self, prompt: str, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of all images in order, ``(num_features, hidden_size * (1 + levels))``."""

        def make() -> torch.Tensor:
            inputs = self.inputs(prompt, images)
            names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
            given = {name: inputs[name] for name in names if name in inputs}
            return _all_depths(self.model.get_image_features(**given))

        return self._once(images, (), "features", prompt, make=make)

    def video_features(self, prompt: str, videos: Sequence[Video]) -> torch.Tensor:
        """Features of all videos in order, ``(num_features, hidden_size * (1 + levels))``."""

        def make() -> torch.Tensor:
            inputs = self.inputs(prompt, (), videos)
            names = ("pixel_values_videos", "video_grid_thw")
            given = {name: inputs[name] for name in names if name in inputs}
            return _all_depths(self.model.get_video_features(**given))

        return self._once((), videos, "video_features", prompt, make=make)


def _all_depths(output: Any) -> torch.Tensor:
    """Features as columns: those of the input, if there are any, then those of each level."""
    given = [] if output.pooler_output is None else [output.pooler_output]
    for level in getattr(output, "deepstack_features", None) or []:
        # Granite Vision 4 puts the number of a decoder layer before each.
        given.append(level[1] if isinstance(level[0], int) else level)
    return torch.cat([torch.cat(list(items)) for items in given], dim=1)
