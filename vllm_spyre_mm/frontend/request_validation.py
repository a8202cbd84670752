# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for. Each refusal is a sentence, raised before the engine sees it."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from vllm_spyre_mm.config import SpyreSettings
    from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice
    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils


NO_TOKEN = -1


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
    try:
        msgspec.msgpack.encode(params, enc_hook=lambda _: None)
    except (OverflowError, UnicodeEncodeError) as error:
        raise VLLMValidationError(
            "the sampling parameters hold a number or a text that cannot be sent to the engine: "
            f"{error}"
        ) from None


def prepare_embedding(request: "EngineCoreRequest", vllm_config: "VllmConfig") -> None:
    """Check what a request wants back, in place of a failure in the engine.

    A request that does not run the decoder leaves blocks that hold nothing: it gets a
    ``cache_salt`` of its own, so that no other ever finds them in the prefix cache.

    Raises:
        VLLMValidationError: says what is wrong with the choice, or how large the embedding is.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_spyre_mm.config import SpyreSettings
    from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG, choice_of
    from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

    params, settings = request.sampling_params, SpyreSettings.from_vllm_config(vllm_config)
    choice = choice_of(params, settings)
    if choice is None or params is None:
        return
    mapping = get_mm_mapping(vllm_config.model_config.hf_config)
    for modality in choice.modalities or ():
        if modality not in mapping.modalities:
            taken = " and ".join(mapping.modalities) or "none but text"
            raise VLLMValidationError(
                f"return_mm_embedding has the modality {modality!r}, and the model takes {taken}",
                parameter=EXTRA_ARG,
            )
    wanted = [each for each in request.mm_features or () if choice.wants(each.modality)]
    if choice.needs_layout and _has_unknown_places(wanted, mapping):
        raise VLLMValidationError(
            "return_mm_embedding chooses by place, and an image that is given as an embedding "
            "has none",
            parameter=EXTRA_ARG,
        )
    _check_embedding_size(choice, wanted, settings, mapping)
    if not choice.generate:
        if params.max_tokens != 1 or params.n != 1:
            raise VLLMValidationError(
                "return_mm_embedding with generate=false needs max_tokens=1 and n=1: there is no "
                "text",
                parameter=EXTRA_ARG,
            )
        request.cache_salt = uuid.uuid4().hex


def _has_unknown_places(features: "Sequence[MultiModalFeatureSpec]", mapping: "MMUtils") -> bool:
    """Whether an item is given as features of which nobody says what they stand for."""
    from vllm_spyre_mm.multimodal.given_features import given_features

    return any(
        mapping.feature_layout(feature.data or {}) is None
        for feature in features
        if given_features(feature) is not None
    )


def _check_embedding_size(
    choice: "EmbeddingChoice",
    features: "Sequence[MultiModalFeatureSpec]",
    settings: "SpyreSettings",
    mapping: "MMUtils",
) -> None:
    """Refuse an embedding beyond the request's own bound, or beyond what is ever held."""
    from vllm.exceptions import VLLMValidationError

    from vllm_spyre_mm.multimodal.embedding import item_sizes
    from vllm_spyre_mm.multimodal.embedding_choice import EXTRA_ARG

    items = item_sizes(choice, features, mapping.feature_layout)
    size = choice.num_bytes(
        items, mapping.text_config.hidden_size, mapping.feature_width, settings.encoder_dtype
    )
    held = settings.max_held_mm_embedding_bytes
    limit = held if choice.max_bytes is None else min(choice.max_bytes, held)
    if size > limit:
        raise VLLMValidationError(
            f"the embedding would have {choice.num_rows(items)} rows and {size} bytes, more than "
            f"the limit of {limit}: choose a pooling, a smaller dtype or fewer images",
            parameter=EXTRA_ARG,
        )


def validate_engine_request(request: "EngineCoreRequest", model_config: "ModelConfig") -> None:
    """Refuse a request with tokens that the decoder cannot be given.

    An image or video token outside of every placeholder (typed into the text, or one ``<image>``
    tag too many) has no features to stand for; the model has never seen its bare embedding. A token
    that the tokenizer knows and the model does not has no embedding at all.

    Args:
        request: with placeholders expanded by vLLM's processor.
        model_config: of the engine.

    Raises:
        VLLMValidationError: says which tokens, and where the first is.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_spyre_mm.multimodal.merge import first_without_row
    from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping

    if request.resumable:
        raise VLLMValidationError("streaming input is not supported on Spyre")
    if request.prompt_token_ids is None:
        raise VLLMValidationError("a prompt given as embeddings is not supported on Spyre")
    multimodal = model_config.multimodal_config
    if multimodal is not None and multimodal.mm_encoder_only and not request.mm_features:
        raise VLLMValidationError(
            "this engine runs the vision encoder alone: it takes prompts with images or videos"
        )
    mapping = get_mm_mapping(model_config.hf_config)
    num_rows = mapping.text_config.vocab_size
    position = first_without_row(request.prompt_token_ids, request.mm_features or (), num_rows)
    if position is not None:
        raise VLLMValidationError(
            f"the prompt has token {request.prompt_token_ids[position]} at position {position}, "
            f"for which the model's embedding of {num_rows} rows has none: leave it out"
        )
    _forget_tokens_without_row(request.sampling_params, num_rows)
    text = np.array(request.prompt_token_ids)
    for feature in request.mm_features or ():
        place = feature.mm_position
        text[place.offset : place.offset + place.length] = NO_TOKEN
    for modality, token_id in mapping.feature_token_ids.items():
        stray = text == token_id
        if stray.any():
            raise VLLMValidationError(
                f"the prompt has {int(stray.sum())} {modality} token(s) (id {token_id}) that "
                f"belong to no {modality}, the first at position {int(stray.argmax())}: give as "
                f"many {modality}s as the prompt has {modality} tags"
            )


def _forget_tokens_without_row(params: "SamplingParams | None", num_rows: int) -> None:
    """Take stop tokens and bad words that the model cannot generate out of a request, in place.

    They come of the tokenizer and of the generation configuration, and vLLM would look for their
    logits.
    """
    if params is None:
        return
    stops = params.all_stop_token_ids
    stops.difference_update([token_id for token_id in stops if token_id >= num_rows])
    words = params.bad_words_token_ids
    if words is not None:
        words[:] = [word for word in words if max(word) < num_rows]
