# SPDX-License-Identifier: Apache-2.0
"""The decisions on ``VllmConfig``, the scheduler, the KV cache, loading and observability."""

from typing import TYPE_CHECKING, Any

import torch

from vllm_spyre_mm.config import BLOCK_SIZE
from vllm_spyre_mm.frontend.flags.decision import Decisions, Refused, only, unset, words
from vllm_spyre_mm.multimodal.feature_check import dtype_name

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER_CLASS = "vllm_spyre_mm.scheduler.scheduler.SpyreScheduler"
MIXTURES = "no model with a mixture of experts is served"
MAMBA = "no model with Mamba layers is served"


def _whole_chunk(value: int | None, vllm_config: "VllmConfig") -> bool:
    return not value or value >= vllm_config.scheduler_config.max_num_batched_tokens


def _no_offloading(value: Any, _: "VllmConfig") -> bool:
    return (
        value.offload_backend == "auto"
        and not value.uva.cpu_offload_gb
        and not value.prefetch.offload_group_size
    )


def _cache_dtype(value: str, vllm_config: "VllmConfig") -> bool:
    assert vllm_config.model_config is not None, "partial configurations are not checked"
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolves names when it makes the configuration"
    return value in ("auto", dtype_name(dtype))


def _block_size(value: int, vllm_config: "VllmConfig") -> bool:
    return value == BLOCK_SIZE or not vllm_config.cache_config.user_specified_block_size


def _in_chunks(value: bool, vllm_config: "VllmConfig") -> bool:
    """vLLM turns chunks off by itself where there is no KV cache; nothing is computed in them."""
    return value or vllm_config.is_mm_encoder_only


ENGINE = Decisions(
    path="",
    refused=(
        Refused("lora_config", "LoRA (--enable-lora)", unset),
        Refused("speculative_config", "speculative decoding", unset),
        Refused("kv_transfer_config", "KV transfer (--kv-transfer-config)", unset),
        Refused("watermark_config", "marks in generated text (--watermark-config)", unset),
        Refused("diffusion_config", "diffusion (--diffusion-config)", unset),
        Refused("engram_config", "engram tables (--engram-config)", unset),
        Refused("weight_transfer_config", "new weights (--weight-transfer-config)", unset),
        Refused(
            "offload_config",
            "offloading of weights (--cpu-offload-gb, --offload-group-size): they are in the "
            "host's memory anyway",
            _no_offloading,
        ),
        Refused(
            "ec_manager_config",
            "an encoder cache manager of your own (--ec-manager-config)",
            lambda value, _: value.encoder_cache_manager_cls is None,
        ),
        Refused(
            "aux_output_config",
            "routed experts (--enable-return-routed-experts)",
            lambda value, _: not value.enable_return_routed_experts,
        ),
        Refused(
            "attention_config",
            "a choice of attention kernels (--attention-backend): the platform has its own",
            lambda value, _: value.backend is None,
        ),
        Refused(
            "profiler_config",
            "vLLM's profiler (--profiler-config)",
            lambda value, _: value.profiler is None,
        ),
        Refused(
            "use_v2_model_runner", "vLLM's second model runner or what requires it", only(False)
        ),
    ),
    honoured=words(
        "model_config cache_config parallel_config scheduler_config load_config additional_config "
        "structured_outputs_config observability_config logging_config kv_events_config "
        "ec_transfer_config "
        "reasoning_config shutdown_timeout instance_id watchdog_config"
    ),
    without_effect={
        "the platform compiles by itself": words("compilation_config optimization_level"),
        "the platform has kernels of its own": words("kernel_config performance_mode"),
        MAMBA: ("mamba_config",),
        "the platform says where a model runs": ("device_config",),
    },
    derived=("quant_config",),
)

EC_TRANSFER = Decisions(
    path="ec_transfer_config",
    refused=(
        Refused(
            "ec_connector",
            "ec_connector={value!r}, which wants vLLM's own model runners: use ECExampleConnector "
            "or a connector of your own",
            lambda value, _: value not in ("ECCPUConnector", "ECMooncakeConnector"),
        ),
    ),
    honoured=words(
        "ec_role engine_id ec_connector_module_path ec_connector_extra_config ec_ip ec_port"
    ),
    without_effect={
        "features stay on the host": words("ec_buffer_device ec_buffer_size"),
    },
    derived=("mm_encoder_output_widths",),
)

SCHEDULER = Decisions(
    path="scheduler_config",
    refused=(
        Refused(
            "scheduler_cls",
            "a scheduler of your own (--scheduler-cls)",
            only(None, SCHEDULER_CLASS),
        ),
        Refused(
            "enable_chunked_prefill",
            "prefill without chunks (--no-enable-chunked-prefill)",
            _in_chunks,
        ),
        Refused(
            "disable_chunked_mm_input",
            "--disable-chunked-mm-input: images may span chunks",
            only(False),
        ),
        Refused(
            "max_num_scheduled_tokens",
            "max-num-scheduled-tokens={value}, less than a chunk: chunks are whole, lower "
            "--max-num-batched-tokens instead",
            _whole_chunk,
        ),
        Refused(
            "long_prefill_token_threshold",
            "long-prefill-token-threshold={value}, less than a chunk: chunks are whole and prompts "
            "do not share them, lower --max-num-batched-tokens instead",
            _whole_chunk,
        ),
    ),
    honoured=words(
        "max_num_batched_tokens max_num_seqs max_num_active_seqs max_num_queued_reqs "
        "max_num_queued_tokens policy scheduler_reserve_full_isl watermark stream_interval"
    ),
    without_effect={
        "a threshold below a chunk is refused": ("long_prefill_token_threshold_adaptive",),
        "all layers have one kind of attention": ("disable_hybrid_kv_cache_manager",),
        "data-parallel engines do not wait for each other": ("prefill_schedule_interval",),
        "the runner is synchronous": ("async_scheduling",),
    },
    derived=words(
        "runner_type is_multimodal_model max_num_encoder_input_tokens encoder_cache_size"
    ),
)

CACHE = Decisions(
    path="cache_config",
    refused=(
        Refused("cache_dtype", "kv-cache-dtype={value!r}", _cache_dtype),
        Refused(
            "block_size",
            f"block-size={{value}} (Spyre's blocks have {BLOCK_SIZE} tokens)",
            _block_size,
        ),
        Refused(
            "prefix_match_unit",
            "prefix-match-unit={value}: a hit in the prefix cache ends with a block",
            only(None, BLOCK_SIZE),
        ),
        Refused("kv_offloading_size", "KV offloading (--kv-offloading-size)", unset),
    ),
    honoured=words(
        "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override "
        "enable_prefix_caching prefix_caching_hash_algo"
    ),
    without_effect={
        "the KV cache is not quantised": ("kv_cache_dtype_skip_layers",),
        "KV offloading is refused": words("kv_offloading_backend simple_cpu_offload_num_blocks"),
        "all layers have one kind of attention and a cache of their own": words(
            "prefix_cache_retention_interval kv_sharing_fast_prefill swa_bounded_replay"
        ),
        MAMBA: words(
            "mamba_page_size_padded mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype "
            "mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len "
            "use_replayssm"
        ),
    },
    derived=words(
        "user_specified_block_size kv_cache_layout is_attention_free sliding_window "
        "skip_page_size_padded use_kda_recoverssm num_gpu_blocks num_cpu_blocks "
        "effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency "
        "hash_block_size cache_hit_alignment_tokens _block_size_resolved"
    ),
)

LOAD = Decisions(
    path="load_config",
    refused=(
        Refused(
            "load_format",
            "load-format={value!r}: weights are read from safetensors, or random with 'dummy'",
            only("auto", "hf", "safetensors", "dummy"),
        ),
        Refused(
            "safetensors_load_strategy",
            "safetensors-load-strategy={value!r}: quantised checkpoints are not served",
            only(None, "lazy", "eager", "prefetch"),
        ),
        Refused(
            "model_loader_extra_config",
            "settings of a loader of vLLM's (--model-loader-extra-config)",
            unset,
        ),
    ),
    honoured=words("download_dir ignore_patterns"),
    without_effect={
        "the platform reads weights in its own way, to the host": words(
            "safetensors_prefetch_num_threads safetensors_prefetch_block_size device "
            "use_tqdm_on_load pt_load_map_location"
        ),
    },
)

OBSERVABILITY = Decisions(
    path="observability_config",
    refused=(),
    honoured=words(
        "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
        "kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets enable_mfu_metrics "
        "enable_mm_processor_stats enable_logging_iteration_details"
    ),
    without_effect={
        "there are no CUDA graphs and no Triton kernels": words(
            "cudagraph_metrics enable_layerwise_nvtx_tracing jit_monitor_mode jit_monitor_verbose"
        ),
        "there is no speculative decoding": ("per_request_spec_decode_metrics",),
    },
)
