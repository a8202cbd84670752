# SPDX-License-Identifier: Apache-2.0
"""Runs the model on dummy requests before the first real one, so that every graph is compiled.

Dummy requests are complete: pictures that go through vLLM's processor, token ids, sampling. So the
vision tower, the projector, the merge, the prefill and the decode are all traced as they will run.
A backend may have the encoder, or the decoder's graphs, run alone before.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.backend import WarmupWork
from vllm_spyre_mm.model_executor.step_inputs import DecodeRows
from vllm_spyre_mm.multimodal.merge import TEXT, first_without_row
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner
from vllm_spyre_mm.worker.prefill import prefill_chunk

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

GRAPH_PROMPT = 42
"""Tokens of the prompt that the decoder's graphs run on: they lie in one block, with a next one."""


@dataclass(frozen=True, slots=True)
class WarmupRequest:
    """A dummy request.

    Attributes:
        name: shown by the progress bar; also its request id.
        token_ids: the prompt, placeholders expanded.
        mm_features: its images.
    """

    name: str
    token_ids: list[int]
    mm_features: list[MultiModalFeatureSpec]


def warm_up(runner: SpyreModelRunner, vllm_config: "VllmConfig") -> list[MultiModalFeatureSpec]:
    """Run the passes of the backend's warmup: dummy requests, or parts of the model.

    Uses the first blocks of the KV cache, which no request owns yet. A model without its encoder
    gets made-up features in place of encoded ones.

    Returns:
        The pictures of the dummy requests.
    """
    requests = list(_requests(vllm_config, runner))
    together = min(2, vllm_config.scheduler_config.max_num_seqs)
    for each in runner.spyre_model.warmup_passes():
        with each.context:
            if each.work is WarmupWork.ENCODER:
                if runner.spyre_model.part.has_encoder:
                    _encode_all(runner, requests, each.title)
            elif each.work is WarmupWork.GRAPHS:
                _run_graphs(runner, each.title)
            else:
                _run_all(runner, requests, together, each.title)
    shapes = ", ".join(request.name for request in requests)
    logger.info("The warmup ran %d dummy requests: %s", len(requests), shapes)
    return [picture for request in requests for picture in request.mm_features]


def _requests(vllm_config: "VllmConfig", runner: SpyreModelRunner) -> Iterator[WarmupRequest]:
    """Text alone, then the pictures that the mapping names.

    A video takes the graphs of a picture: a picture is shown also where only videos may be.
    """
    model_config = vllm_config.model_config
    longest = max(1, min(2 * runner.geometry.chunk_size, model_config.max_model_len - 4))
    mapping = runner.spyre_model.mapping
    yield WarmupRequest(f"text of {longest} tokens", made_up_tokens(mapping, longest), [])
    image_token_id = mapping.image_token_id
    if image_token_id is None:
        return
    limit = model_config.get_multimodal_config().get_limit_per_prompt
    if not any(limit(modality) for modality in mapping.modalities):
        return
    from PIL import Image

    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    for (width, height), kwargs in _pictures(mapping):
        picture = Image.new("RGB", (width, height))
        items = processor.info.parse_mm_data({"image": [picture]}, validate=False)
        processed = processor([image_token_id], items, hf_processor_mm_kwargs=kwargs)
        token_ids = processed["prompt_token_ids"]
        if len(token_ids) > model_config.max_model_len - 4:
            continue  # no request can hold such a picture
        given = f" with {', '.join(kwargs)}" if kwargs else ""
        name = f"picture of {width}x{height}{given}"
        feature = MultiModalFeatureSpec(
            data=processed["mm_kwargs"]["image"][0],
            modality="image",
            identifier=f"warmup-{name}",
            mm_position=processed["mm_placeholders"]["image"][0],
        )
        _check_rows(token_ids, feature, mapping.text_config.vocab_size)
        yield WarmupRequest(name, token_ids, [feature])


def _pictures(mapping: MMUtils) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Width and height of each picture, and what the processor is given with it."""
    sizes = mapping.warmup_image_sizes()
    if kwargs := mapping.warmup_processor_kwargs():
        yield sizes[-1], kwargs
    yield from ((size, {}) for size in sizes)


def _check_rows(token_ids: list[int], feature: MultiModalFeatureSpec, num_rows: int) -> None:
    """Raise ValueError if a placeholder has a text token without a row in the text embedding."""
    position = first_without_row(token_ids, [feature], num_rows)
    if position is not None:
        raise ValueError(
            f"the processor puts token {token_ids[position]} beside an image's features, but the "
            f"model's embedding has {num_rows} rows: the tokenizer or the processor is another "
            "model's, or the embedding was not resized when tokens were added"
        )


def made_up_tokens(mapping: MMUtils, length: int) -> list[int]:
    """Token ids of words, the same on every rank: none that means something to the model."""
    config = mapping.text_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    given = [getattr(config, name, None) for name in names]
    special = {0, *mapping.feature_token_ids.values()}.union(
        *(each if isinstance(each, list) else [each] for each in given)
    )
    words = [token_id for token_id in range(config.vocab_size) if token_id not in special]
    return random.Random(0).choices(words, k=length)


def _encode_all(runner: SpyreModelRunner, requests: list[WarmupRequest], title: str) -> None:
    """The pictures of each request."""
    with tqdm([each for each in requests if each.mm_features], desc=title, unit="step") as progress:
        for request in progress:
            progress.set_postfix_str(request.name)
            runner.encode(dict(enumerate(request.mm_features)))


def _run_graphs(runner: SpyreModelRunner, title: str) -> None:
    """One chunk with the whole of a prompt in block 1, and one decode."""
    model, inputs = runner.spyre_model, runner.inputs
    *prompt, token_id = made_up_tokens(model.mapping, GRAPH_PROMPT + 1)
    with (
        tqdm(total=2, desc=title, unit="step") as progress,
        model.backend.without_gradients(),
    ):
        progress.set_postfix_str("prefill")
        chunk = prefill_chunk(
            token_ids=prompt,
            start=0,
            num_tokens=len(prompt),
            blocks=[1],
            feature_index=np.full(len(prompt), TEXT),
            geometry=runner.geometry,
            padded=inputs.padded,
        )
        model.forward(inputs.chunk_inputs(chunk, model.embed(chunk.token_ids)))
        progress.update()
        progress.set_postfix_str("decode")
        rows = DecodeRows(
            [token_id], [len(prompt)], [len(prompt)], [[1]], np.array([[1]], dtype=np.int32)
        )
        model.forward(inputs.decode_inputs(rows, model.embed))
        progress.update()


def _run_all(
    runner: SpyreModelRunner, requests: list[WarmupRequest], together: int, title: str
) -> None:
    """Run each request alone (prefill in chunks, one decode), then one decode of the last together.

    In a small cache requests may share blocks and read each other's keys and values: the numbers do
    not matter here.
    """
    lengths: dict[str, int] = {}
    num_blocks = len(runner.spyre_model.kv_cache[0][0])
    next_block = 1
    with tqdm(total=2 * len(requests) + 1, desc=title, unit="step") as progress:
        for request in requests:
            progress.set_postfix_str(f"prefill, {request.name}")
            blocks = runner.geometry.num_blocks(len(request.token_ids) + 4)
            if next_block + blocks > num_blocks:
                next_block = 1
            _prefill(runner, request, list(range(next_block, next_block + blocks)))
            progress.update()
            progress.set_postfix_str(f"decode, {request.name}")
            _decode(runner, {request.name: len(request.token_ids)})
            progress.update()
            if request in requests[-together:]:
                lengths[request.name] = len(request.token_ids) + 1
                next_block += blocks
            else:
                _finish(runner, [request.name])
        progress.set_postfix_str(f"decode of {len(lengths)} together")
        _decode(runner, lengths)
        progress.update()
    _finish(runner, list(lengths))
    runner.reset_encoder_cache()


def _prefill(runner: SpyreModelRunner, request: WarmupRequest, block_ids: list[int]) -> None:
    num_tokens, start = len(request.token_ids), 0
    new = NewRequestData(
        req_id=request.name,
        prompt_token_ids=request.token_ids,
        mm_features=request.mm_features,
        # vLLM compiles a helper when log probabilities are first requested.
        sampling_params=SamplingParams(temperature=0.0, logprobs=1),
        pooling_params=None,
        block_ids=(block_ids,),
        num_computed_tokens=0,
        lora_request=None,
    )
    images = _pictures_to_encode(runner, request)
    while start < num_tokens:
        output = SchedulerOutput.make_empty()
        if start == 0:
            output.scheduled_new_reqs = [new]
            output.scheduled_encoder_inputs = {request.name: images} if images else {}
        else:
            output.scheduled_cached_reqs = _cached({request.name: start})
        end = runner.geometry.chunk_end(num_tokens, start)
        _step(runner, output, {request.name: end - start})
        start = end


def _pictures_to_encode(runner: SpyreModelRunner, request: WarmupRequest) -> list[int]:
    """Indices of the pictures that the first step has to encode; others are in the cache."""
    if runner.spyre_model.part.has_encoder:
        return list(range(len(request.mm_features)))
    width, dtype = runner.spyre_model.mapping.feature_width, runner.encoder.dtype
    for picture in request.mm_features:
        rows = torch.zeros(picture.mm_position.get_num_embeds(), width, dtype=dtype)
        runner.encoder_cache.put(picture, rows)
    return []


def _decode(runner: SpyreModelRunner, lengths: dict[str, int]) -> None:
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = _cached(lengths)
    _step(runner, output, dict.fromkeys(lengths, 1))


def _finish(runner: SpyreModelRunner, req_ids: list[str]) -> None:
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = set(req_ids)
    runner.execute_model(output)


def _step(runner: SpyreModelRunner, output: SchedulerOutput, scheduled: dict[str, int]) -> None:
    output.num_scheduled_tokens = scheduled
    output.total_num_scheduled_tokens = sum(scheduled.values())
    if runner.execute_model(output) is None:
        runner.sample_tokens(None)


def _cached(num_computed: dict[str, int]) -> CachedRequestData:
    cached = CachedRequestData.make_empty()
    cached.req_ids = list(num_computed)
    cached.num_computed_tokens = list(num_computed.values())
    cached.new_block_ids = [None] * len(num_computed)
    cached.num_output_tokens = [0] * len(num_computed)
    return cached
