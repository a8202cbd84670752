# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for. Each refusal is a sentence, raised before the engine sees it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest


def validate_params(params: "SamplingParams | PoolingParams") -> None:
    """Refuse sampling parameters that the platform cannot honour.

    Raises:
        VLLMValidationError: says which one (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    if not isinstance(params, SamplingParams):
        raise VLLMValidationError("pooling requests are not supported on Spyre: use generate")
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        raise VLLMValidationError(
            "prompt_logprobs is not supported on Spyre: a prefill computes the logits of the last "
            "token only. logprobs of generated tokens are supported.",
            parameter="prompt_logprobs",
        )


def validate_images(images: Iterable[object]) -> None:
    """Refuse a picture without pixels.

    Args:
        images: PIL pictures and arrays of a prompt, in its order; None for one that is named by
            its ``uuid`` alone.

    Raises:
        VLLMValidationError: says which picture and how large it is.
    """
    from PIL import Image
    from vllm.exceptions import VLLMValidationError

    for index, image in enumerate(images):
        if isinstance(image, Image.Image):
            shape, said = image.size, f"{image.width}x{image.height} pixels (width x height)"
        else:  # an array; vLLM refuses other types in its own words
            shape = tuple(getattr(image, "shape", ()))
            said = f"an array of shape {shape}"
        if 0 in shape:
            raise VLLMValidationError(
                f"image {index} of the prompt is empty: {said}", parameter="image"
            )


def validate_tags(modality: str, num_items: int, num_tags: int) -> None:
    """Refuse a prompt with fewer tags than pictures.

    Args:
        modality: vLLM's name, ``image``.
        num_items: given beside the prompt.
        num_tags: found in it, one at most for each.

    Raises:
        VLLMValidationError: names both counts.
    """
    from vllm.exceptions import VLLMValidationError

    if num_tags < num_items:
        raise VLLMValidationError(
            f"the prompt has {num_tags} {modality} tag(s) for {num_items} {modality}(s): put one "
            "tag into the prompt for each",
            parameter=modality,
        )


def validate_engine_request(request: "EngineCoreRequest", model_config: "ModelConfig") -> None:
    """Refuse a request whose image tokens are not all inside an image's placeholder.

    An image token elsewhere (typed into the text, or one ``<image>`` tag too many) has no features
    to stand for; the model has never seen its bare embedding.

    Args:
        request: with placeholders expanded by vLLM's processor.
        model_config: of the engine.

    Raises:
        VLLMValidationError: says how many such tokens there are and where the first is.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

    if request.resumable:
        raise VLLMValidationError("streaming input is not supported on Spyre")
    if request.prompt_token_ids is None:
        raise VLLMValidationError("a prompt given as embeddings is not supported on Spyre")
    image_token_id = get_mm_mapping(model_config.hf_config).image_token_id
    if image_token_id is None:
        return  # every token of a text model is text
    stray = np.asarray(request.prompt_token_ids) == image_token_id
    for feature in request.mm_features or ():
        position = feature.mm_position
        stray[position.offset : position.offset + position.length] = False
    num_stray = int(stray.sum())
    if num_stray:
        raise VLLMValidationError(
            f"the prompt has {num_stray} image token(s) (id {image_token_id}) that belong to no "
            f"image, the first at position {int(stray.argmax())}: give as many images as the "
            "prompt has image tags"
        )
