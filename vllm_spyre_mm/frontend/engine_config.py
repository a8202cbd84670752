# SPDX-License-Identifier: Apache-2.0
"""Checks and defaults for a new engine: what does not fit together, and what each ``auto`` becomes.

What is refused of vLLM's flags, one by one, is said in :mod:`vllm_spyre_mm.frontend.flags`.
"""

import logging
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.config import (
    BLOCK_SIZE,
    SpyreSettings,
    decoder_dtype_of,
    settings_summary,
)
from vllm_spyre_mm.environment import (
    card_batch_tkv_limit,
    card_mode_fault,
    process_environment,
    rust_frontend_requested,
    vllm_fixes_enabled,
)
from vllm_spyre_mm.frontend.card_limits import size_card_cache, take_known_configuration
from vllm_spyre_mm.frontend.data_parallel import divide_host
from vllm_spyre_mm.frontend.encoder_transfer import (
    check_encoder_transfer,
    without_card,
    without_look_ahead,
)
from vllm_spyre_mm.frontend.flags import SCHEDULER_CLASS, WORKER_CLASS, refuse_unsupported
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.cpu.tier import compiled_for, cpu_tier, detect_tier
from vllm_spyre_mm.model_executor.cpu.torch_internals import takes_architecture, why_not_compiled
from vllm_spyre_mm.model_executor.models.decoders import DECODERS
from vllm_spyre_mm.multimodal.feature_check import dtype_name
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping
from vllm_spyre_mm.scheduler.geometry import geometry_of
from vllm_spyre_mm.upstream.contract import untested_versions

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

logger = get_logger(__name__)

CARD_TIMEOUT_SECONDS = 3600
"""How long a rank waits for the others, unless the user says: some compile much longer than others.
"""


def check_and_resolve(vllm_config: "VllmConfig", host_dtypes: tuple[torch.dtype, ...]) -> None:
    """Check a configuration and make it the platform's, in place.

    Args:
        vllm_config: what vLLM built from the user's arguments.
        host_dtypes: what the host computes in, fastest first.

    Raises:
        ValueError: the configuration asks for something that the platform cannot do.
    """
    settings = SpyreSettings.parse(vllm_config.additional_config)
    if vllm_config.model_config is None:
        return  # vLLM builds partial configurations for its own tools
    if rust_frontend_requested():
        raise ValueError("not supported on Spyre: vLLM's Rust front end (VLLM_USE_RUST_FRONTEND)")
    refuse_unsupported(vllm_config)
    _leave_head_to_loader(vllm_config.model_config)
    mapping = get_mm_mapping(vllm_config.model_config.hf_config)
    model_config, scheduler_config = vllm_config.model_config, vllm_config.scheduler_config
    dtype = decoder_dtype_of(vllm_config)

    is_new = not settings.resolved  # vLLM builds configurations anew
    can_compile = why_not_compiled() is None
    if vllm_config.is_mm_encoder_only:
        settings = without_card(settings, model_config.enforce_eager, can_compile)
    if is_new and settings.resolve_backend(model_config.enforce_eager) == "sendnn":
        settings = _with_card_environment(settings)
        settings = take_known_configuration(vllm_config, mapping, settings)
    settings = settings.resolve(
        enforce_eager=model_config.enforce_eager,
        decoder_dtype=dtype_name(dtype),
        host_dtypes=tuple(map(dtype_name, host_dtypes)),
        max_model_len=model_config.max_model_len,
        max_num_seqs=scheduler_config.max_num_seqs,
        can_compile=can_compile,
    )
    settings = without_look_ahead(settings, vllm_config)
    if is_new:
        settings = divide_host(vllm_config, settings)
    _check_backend(settings, dtype, scheduler_config.max_num_batched_tokens, host_dtypes)
    _check_executor(settings, vllm_config.parallel_config)
    _check_divisible(vllm_config, mapping, settings)
    check_encoder_transfer(vllm_config, settings, mapping)
    _check_embeddings(vllm_config, mapping)
    _check_tokenizer(vllm_config, mapping)
    vllm_config.additional_config = settings.model_dump()

    _take_over_execution(vllm_config)
    if settings.backend == "sendnn":
        _wait_for_compiling_ranks(vllm_config.parallel_config)
    _size_caches(vllm_config, settings)
    geometry_of(vllm_config).context_len(model_config.max_model_len)  # checks both
    if is_new and settings.backend == "sendnn":
        size_card_cache(vllm_config, mapping, settings)
    if is_new:
        _warn_of_releases(settings)
    _log_summary(vllm_config, settings, mapping, logging.INFO if is_new else logging.DEBUG)


def _log_summary(
    vllm_config: "VllmConfig", settings: SpyreSettings, mapping: MMUtils, level: int
) -> None:
    """Log everything that was resolved, in one line."""
    scheduler_config, cache_config = vllm_config.scheduler_config, vllm_config.cache_config
    logger.log(
        level,
        "Spyre platform: %s",
        settings_summary(
            settings,
            cpu_tier=cpu_tier(),
            compiled_for="nothing" if settings.backend == "eager" else compiled_for(),
            mapping=type(mapping).__name__,
            dtype=dtype_name(decoder_dtype_of(vllm_config)),
            chunk_size=scheduler_config.max_num_batched_tokens,
            block_size=cache_config.block_size,
            max_num_seqs=scheduler_config.max_num_seqs,
            max_model_len=vllm_config.model_config.max_model_len,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
            data_parallel_size=vllm_config.parallel_config.data_parallel_size,
            prefix_caching=cache_config.enable_prefix_caching,
            vllm_fixes=vllm_fixes_enabled(),
        ),
    )


def _warn_of_releases(settings: SpyreSettings) -> None:
    """Warn of releases that were not tested, and of what the installed ones cannot do."""
    for sentence in untested_versions():
        logger.warning("%s: it has all that is leant on, and may differ elsewhere", sentence)
    if reason := why_not_compiled():
        logger.warning("%s: nothing is compiled for the CPU, and all takes longer", reason)
    elif settings.backend != "eager" and cpu_tier() != detect_tier() and not takes_architecture():
        logger.warning(
            "SPYRE_MM_CPU_TIER=%s: PyTorch %s compiles graphs for the machine at hand all the "
            "same, so that the compile cache must not be moved to an older CPU",
            cpu_tier(),
            torch.__version__,
        )


def _with_card_environment(settings: SpyreSettings) -> SpyreSettings:
    """Settings that take over what the environment gives of them; says what may not be meant."""
    fault = card_mode_fault(process_environment())
    if fault is not None:
        logger.warning("the runtime of the card may not take a card: %s", fault)
    limit = card_batch_tkv_limit()
    if limit is None:
        return settings
    if settings.max_batch_tkv is None:
        return settings.model_copy(update={"max_batch_tkv": limit})
    if settings.max_batch_tkv != limit:
        logger.warning(
            "max_batch_tkv=%s is taken, not VLLM_DT_MAX_BATCH_TKV_LIMIT=%s of the environment",
            settings.max_batch_tkv,
            limit,
        )
    return settings


def _leave_head_to_loader(model_config: "ModelConfig") -> None:
    """Undo what vLLM does where a tied head is stored: the loader compares it with the embedding.

    vLLM unties them in the configuration, and ties equal ones again in a loader of its own.
    """
    if model_config.word_embeddings_untied_by_checkpoint:
        model_config.hf_config.tie_word_embeddings = True


def _check_divisible(vllm_config: "VllmConfig", mapping: MMUtils, settings: SpyreSettings) -> None:
    """Raise ValueError if heads cannot be padded for the card, or anything divided among ranks."""
    size = vllm_config.parallel_config.tensor_parallel_size
    num_kv_heads = mapping.kv_cache_options(for_card=settings.backend == "sendnn").num_kv_heads
    if num_kv_heads % size:  # vLLM has checked the query heads
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the model's {num_kv_heads} KV heads"
        )
    name = DECODERS[mapping.text_config.model_type].width
    width = getattr(mapping.text_config, name)
    if width % size:
        raise ValueError(f"tensor_parallel_size={size} does not divide the model's {name}, {width}")


def _check_embeddings(vllm_config: "VllmConfig", mapping: MMUtils) -> None:
    """Raise ValueError if ready-made features are allowed and vLLM cannot lay them out."""
    multimodal = vllm_config.model_config.multimodal_config
    transfer = vllm_config.ec_transfer_config
    if transfer is not None and transfer.is_ec_consumer:
        return  # vLLM allows them by itself, and their requests are refused
    if multimodal is not None and multimodal.enable_mm_embeds and not mapping.takes_embeddings:
        raise ValueError(
            "image embeddings as input (--enable-mm-embeds) are not supported for "
            f"{type(mapping).__name__}: vLLM cannot tell the rows of an image from its features"
        )


def _check_tokenizer(vllm_config: "VllmConfig", mapping: MMUtils) -> None:
    """Raise ValueError if the model's processor would be given a tokenizer without image tags."""
    from vllm_spyre_mm.vllm_fixes.mistral_format import uses_own_tokenizer

    if mapping.image_token_id is not None and uses_own_tokenizer(vllm_config.model_config):
        raise ValueError(
            "Mistral's own tokenizer (--tokenizer-mode mistral, or a repository without "
            "tokenizer.json) does not go with the processor of Hugging Face, which the images "
            "need: name a repository that has a tokenizer.json with --tokenizer, and use "
            "--tokenizer-mode hf"
        )


def _check_backend(
    settings: SpyreSettings,
    dtype: torch.dtype,
    chunk_size: int,
    host_dtypes: tuple[torch.dtype, ...],
) -> None:
    if settings.backend == "sendnn":
        if dtype != torch.float16:
            raise ValueError(f"the card runs the decoder in float16, not {dtype_name(dtype)}")
        if chunk_size < 2 * BLOCK_SIZE:
            raise ValueError(
                f"the card needs chunks of at least {2 * BLOCK_SIZE} tokens, got {chunk_size}: "
                "raise --max-num-batched-tokens"
            )
    elif dtype not in host_dtypes:
        raise ValueError(
            f"dtype={dtype_name(dtype)!r} is not supported by the CPU's backends: use --dtype "
            f"{' or '.join(dtype_name(supported) for supported in host_dtypes)}"
        )


def _check_executor(settings: SpyreSettings, parallel: "ParallelConfig") -> None:
    if settings.backend == "sendnn" and parallel.distributed_executor_backend == "ray":
        raise ValueError(
            "cards exchange within one host, whose ranks are started as processes: drop "
            "--distributed-executor-backend ray"
        )


def _take_over_execution(vllm_config: "VllmConfig") -> None:
    """Put the platform's scheduler and worker in place and turn vLLM's own compilation off."""
    from vllm.config import CompilationMode, CUDAGraphMode

    scheduler_config, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    scheduler_config.scheduler_cls = SCHEDULER_CLASS
    # The runner hands its tokens over before the next step is scheduled.
    scheduler_config.async_scheduling = False
    parallel.worker_cls = WORKER_CLASS
    if parallel.world_size == 1 and parallel.distributed_executor_backend != "ray":
        parallel.distributed_executor_backend = "uni"
    parallel.disable_custom_all_reduce = True
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None:
        # For some models vLLM leaves the pixels' normalisation to its own model class.
        multimodal.mm_device_do_normalize = False


def _wait_for_compiling_ranks(parallel: "ParallelConfig") -> None:
    """Raise the timeouts of the process groups to the card's, unless they were given."""
    if parallel.distributed_timeout_seconds is None:
        parallel.distributed_timeout_seconds = CARD_TIMEOUT_SECONDS
    if parallel.cpu_distributed_timeout_seconds is None:
        parallel.cpu_distributed_timeout_seconds = parallel.distributed_timeout_seconds


def _size_caches(vllm_config: "VllmConfig", settings: SpyreSettings) -> None:
    """Block size, and an encoder cache that holds the images of one prompt at least.

    vLLM sets both encoder bounds to the chunk size; an image that did not fit would end a chunk
    in the middle of a block, or never be scheduled.
    """
    vllm_config.cache_config.block_size = BLOCK_SIZE
    assert settings.encoder_cache_tokens is not None, "resolved before"
    vllm_config.scheduler_config.encoder_cache_size = settings.encoder_cache_tokens
    vllm_config.scheduler_config.max_num_encoder_input_tokens = settings.encoder_cache_tokens
