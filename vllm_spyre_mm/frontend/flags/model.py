# SPDX-License-Identifier: Apache-2.0
"""The decisions on ``ModelConfig`` and ``MultiModalConfig``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.frontend.flags.decision import Decisions, Refused, only, unset, words

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _no_images(value: bool, vllm_config: "VllmConfig") -> bool:
    assert vllm_config.model_config is not None, "partial configurations are not checked"
    return not value or vllm_config.model_config.multimodal_config is None


def _hashable(value: Mapping[str, Any] | None, _: "VllmConfig") -> bool:
    """Whether vLLM, which looks a processor up by its settings, can hash each of them."""
    for setting in (value or {}).values():
        within = setting.values() if isinstance(setting, Mapping) else setting
        try:
            hash(tuple(within) if isinstance(setting, Mapping | list | tuple) else setting)
        except TypeError:
            return False
    return True


def _on_the_host(value: Mapping[str, Any] | None, vllm_config: "VllmConfig") -> bool:
    assert vllm_config.model_config is not None, "partial configurations are not checked"
    multimodal = vllm_config.model_config.multimodal_config
    return multimodal is None or multimodal.get_mm_processor_device_type() in (None, "cpu")


MODEL = Decisions(
    path="model_config",
    refused=(
        Refused("runner_type", "runner={value!r} (only 'generate')", only("generate")),
        Refused("quantization", "quantization={value!r}", unset),
        Refused("quantization_config", "quantisation (--quantization-config)", unset),
        Refused("enable_sleep_mode", "sleep mode (--enable-sleep-mode)", unset),
        Refused("enable_prompt_embeds", "prompt embeddings (--enable-prompt-embeds)", unset),
        Refused(
            "config_format",
            "config-format={value!r}: use 'hf'",
            lambda value, _: value != "mistral",
        ),
        Refused(
            "model_impl",
            "model-impl={value!r}: models are FMS's, leave --model-impl out",
            only("auto", "vllm"),
        ),
        Refused(
            "model_class_overrides",
            "a model class of your own (--model-class-overrides): models are FMS's",
            unset,
        ),
        Refused(
            "model_weights",
            "models in object storage ({value}): copy the model to a folder",
            unset,
        ),
        Refused(
            "skip_tokenizer_init",
            "--skip-tokenizer-init with a model that takes images: their processor needs the "
            "tokenizer",
            _no_images,
        ),
        Refused("return_sampling_mask", "sampling masks (--return-sampling-mask)", unset),
        Refused("enable_trace_replay", "replay of given tokens (--enable-trace-replay)", unset),
        Refused(
            "enable_cumem_allocator", "CUDA's memory allocator (--enable-cumem-allocator)", unset
        ),
    ),
    honoured=words(
        "model runner tokenizer tokenizer_mode trust_remote_code dtype seed hf_config_path "
        "allowed_local_media_path allowed_media_domains revision code_revision "
        "tokenizer_revision max_model_len enforce_eager max_logprobs logprobs_mode "
        "use_fp64_gumbel disable_sliding_window served_model_name hf_token "
        "hf_overrides generation_config override_generation_config logits_processors "
        "io_processor_plugin renderer_num_workers"
    ),
    without_effect={
        "pooling is refused": words("convert pooler_config"),
        "quantised checkpoints are refused": ("allow_deprecated_quantization",),
        "speculative decoding is refused": ("spec_target_max_model_len",),
        "sleep mode is refused": words(
            "sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph "
            "enable_nccl_comm_suspend"
        ),
        "vLLM has removed it": ("disable_cascade_attn",),
    },
    derived=words(
        "hf_config hf_text_config is_submodel_config word_embeddings_untied_by_checkpoint "
        "multimodal_config"
    ),
)

MULTIMODAL = Decisions(
    path="model_config.multimodal_config",
    refused=(
        Refused(
            "mm_processor_kwargs",
            "mm-processor-kwargs with a list or an object inside another: put it into the "
            "checkpoint's processor_config.json",
            _hashable,
        ),
        Refused(
            "mm_processor_kwargs",
            "image processing on a device (mm_processor_kwargs): it runs on the host",
            _on_the_host,
        ),
        Refused(
            "video_pruning_rate",
            "pruning of video tokens (--video-pruning-rate)",
            lambda value, _: not value,
        ),
        Refused(
            "mm_encoder_tp_mode",
            "mm-encoder-tp-mode={value!r}: the vision tower is divided as the decoder is",
            only("weights"),
        ),
        Refused(
            "mm_encoder_attn_backend",
            "a choice of the tower's attention kernels (--mm-encoder-attn-backend)",
            unset,
        ),
        Refused(
            "mm_encoder_attn_dtype",
            "mm-encoder-attn-dtype={value!r}: use the setting encoder_dtype",
            unset,
        ),
        Refused("mm_encoder_fp8_scale_path", "a tower in fp8 (--mm-encoder-fp8-scale-path)", unset),
        Refused(
            "mm_encoder_fp8_scale_save_path",
            "a tower in fp8 (--mm-encoder-fp8-scale-save-path)",
            unset,
        ),
    ),
    honoured=words(
        "language_model_only mm_encoder_only limit_per_prompt enable_mm_embeds media_io_kwargs "
        "mm_processor_cache_gb mm_processor_cache_type mm_hasher_algorithm "
        "mm_shm_cache_max_object_size_mb interleave_mm_strings mm_tensor_ipc"
    ),
    without_effect={
        "images are normalised by their processor": ("mm_device_do_normalize",),
        "a tower in fp8 is refused": ("mm_encoder_fp8_scale_save_margin",),
        "memory is not profiled": ("skip_mm_profiling",),
        "pruning of video tokens is refused": ("video_pruning_method",),
        "tensors stay on the host": ("mm_ipc_gpu_memory_gb",),
    },
    derived=("allow_missing_mm_embeddings",),
)
