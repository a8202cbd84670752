# SPDX-License-Identifier: Apache-2.0
"""The decisions on ``ParallelConfig``, and on flags that are no field of a configuration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.flags.decision import Decisions, Refused, only, unset, words
from vllm_spyre_mm.frontend.flags.engine import MAMBA, MIXTURES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER_CLASS = "vllm_spyre_mm.worker.worker.SpyreWorker"


def _known_executor(value: Any, vllm_config: "VllmConfig") -> bool:
    alone = vllm_config.parallel_config.data_parallel_size == 1
    return value in (None, "mp", "uni") or (value == "ray" and alone)


def _not_by_the_user(value: list[int] | None, vllm_config: "VllmConfig") -> bool:
    """vLLM numbers the devices of data-parallel engines after the start's check, for GPUs."""
    return not value or SpyreSettings.from_vllm_config(vllm_config).resolved


PARALLEL = Decisions(
    path="parallel_config",
    refused=(
        Refused(
            "pipeline_parallel_size", "pipeline parallelism (--pipeline-parallel-size)", only(1)
        ),
        Refused(
            "data_parallel_backend",
            "data-parallel-backend={value!r} (only 'mp'): start a headless server on each host",
            only("mp"),
        ),
        Refused("prefill_context_parallel_size", "prefill context parallelism", only(1)),
        Refused("decode_context_parallel_size", "decode context parallelism", only(1)),
        Refused("enable_dbo", "dual batch overlap (--enable-dbo)", unset),
        Refused("nnodes", "several hosts (--nnodes)", only(1)),
        Refused(
            "distributed_executor_backend",
            "distributed-executor-backend={value!r} (only 'mp' and 'uni', or 'ray' for one engine)",
            _known_executor,
        ),
        Refused("worker_cls", "a worker of your own (--worker-cls)", only("auto", WORKER_CLASS)),
        Refused("numa_bind", "binding to NUMA nodes (--numa-bind): start with numactl", unset),
        Refused(
            "assigned_physical_gpu_ids", "a choice of devices (--device-ids)", _not_by_the_user
        ),
        Refused(
            "enable_batch_sharded_sampling",
            "sampling on all ranks (--enable-batch-sharded-sampling)",
            unset,
        ),
        Refused("enable_fault_tolerance", "fault tolerance (--enable-fault-tolerance)", unset),
        Refused("enable_elastic_ep", "elastic expert parallelism (--enable-elastic-ep)", unset),
    ),
    honoured=words(
        "tensor_parallel_size worker_extension_cls distributed_timeout_seconds "
        "cpu_distributed_timeout_seconds enable_shm_tensor_arena data_parallel_size "
        "data_parallel_size_local data_parallel_rank data_parallel_master_ip "
        "data_parallel_rpc_port data_parallel_external_lb data_parallel_hybrid_lb "
        "ray_runtime_env placement_group"
    ),
    without_effect={
        "data-parallel engines do not wait for each other": words(
            "dp_sync_interval data_parallel_master_port disable_nccl_for_dp_synchronization"
        ),
        MIXTURES: words(
            "enable_hc_sp enable_expert_parallel enable_ep_weight_filter enable_eplb eplb_config "
            "expert_placement_strategy all2all_backend elastic_ep_max_dp_size"
        ),
        "dual batch overlap is refused": words(
            "ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold"
        ),
        "context parallelism is refused": words(
            "dcp_kv_cache_interleave_size dcp_comm_backend dcp_q_replicate "
            "cp_kv_cache_interleave_size"
        ),
        "several hosts are refused": words("master_addr master_port node_rank"),
        "Nsight looks at GPUs": ("ray_workers_use_nsight",),
        "binding to NUMA nodes is refused": words("numa_bind_nodes numa_bind_cpus"),
        "ranks exchange through Gloo": ("disable_custom_all_reduce",),
        "fault tolerance is refused": ("fault_tolerance_config",),
        "each rank reads its own part of the weights": ("max_parallel_loading_workers",),
    },
    derived=words(
        "is_moe_model world_size rank _data_parallel_master_port_list _coord_store_port "
        "data_parallel_rank_local "
        "_allow_auto_resolve_cp_interleave_size data_parallel_index _api_process_count "
        "_api_process_rank"
    ),
)

OTHER_FLAGS: Mapping[str, tuple[str, ...]] = {
    "honoured by vLLM's front end": words(
        "aggregate_engine_logging disable_log_stats log_config_file tokens_only "
        "fail_on_environ_validation"
    ),
    "another name of a field that is decided": words(
        "limit_mm_per_prompt scheduling_policy mm_processor_device device_ids enable_lora "
        "lora_target_modules spec_method spec_model spec_tokens data_parallel_address "
        "data_parallel_start_rank data_parallel_multi_port_external_lb"
    ),
    MAMBA: words(
        "mamba_backend mamba_ssu_algorithm enable_mamba_cache_stochastic_rounding "
        "mamba_cache_philox_rounds gdn_prefill_backend kda_prefill_backend kda_decode_backend"
    ),
}
"""Flags of ``EngineArgs`` that no class of the configuration has by this name, by what becomes of
them."""
