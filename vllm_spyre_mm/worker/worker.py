# SPDX-License-Identifier: Apache-2.0
"""The worker of one rank: device, model, KV cache, warmup; vLLM's executor calls it."""

import functools
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed.ec_transfer import (
    ensure_ec_transfer_initialized,
    ensure_ec_transfer_shutdown,
    get_ec_transfer,
    has_ec_transfer,
)
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_spyre_mm.config import SpyreSettings, decoder_dtype_of
from vllm_spyre_mm.environment import export_rank_environment
from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.backends import make_backend
from vllm_spyre_mm.model_executor.checkpoint import find_checkpoint
from vllm_spyre_mm.model_executor.cpu.memory import mmap_threshold
from vllm_spyre_mm.model_executor.dummy_weights import load_dummy_model
from vllm_spyre_mm.model_executor.kv_cache import (
    allocate_kv_cache,
    kv_cache_bytes,
    kv_cache_spec,
)
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping
from vllm_spyre_mm.scheduler.geometry import geometry_of
from vllm_spyre_mm.upstream.processes import is_engine_process
from vllm_spyre_mm.worker.ec_transfer import loaded_part
from vllm_spyre_mm.worker.encode_ahead import AheadEncoding
from vllm_spyre_mm.worker.encode_queue import EncodeQueue
from vllm_spyre_mm.worker.encode_watchdog import watch_encoder
from vllm_spyre_mm.worker.encoder_process.parent import EncoderProcess
from vllm_spyre_mm.worker.encoder_process.placement import (
    encoder_job,
    has_encoder_process,
    leave_threads,
)
from vllm_spyre_mm.worker.encoder_process.queue import ProcessEncodeQueue
from vllm_spyre_mm.worker.encoder_runner import EncoderRunner, WidthProbe
from vllm_spyre_mm.worker.encoding import ImageEncodingError
from vllm_spyre_mm.worker.groups import (
    all_threads,
    decoder_group,
    host_ranks,
    join_process_group,
)
from vllm_spyre_mm.worker.host_share import read_little_endian, take_share
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner
from vllm_spyre_mm.worker.piecewise_queue import PiecewiseEncodeQueue
from vllm_spyre_mm.worker.ranks import Ranks
from vllm_spyre_mm.worker.step_sizes import step_sizes
from vllm_spyre_mm.worker.unsupported_operations import RefusingWorker
from vllm_spyre_mm.worker.warmup import warm_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = get_logger(__name__)


class SpyreWorker(RefusingWorker):
    """Executes one rank of the model, on the host or through the card's compiler."""

    model_runner: SpyreModelRunner  # type: ignore[assignment]  # vLLM says a module or None

    def __init__(
        self,
        vllm_config: "VllmConfig",
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        self.settings = SpyreSettings.from_vllm_config(vllm_config)
        self.geometry = geometry_of(vllm_config)
        self.decoder_dtype = decoder_dtype_of(vllm_config)
        self.mapping = get_mm_mapping(self.model_config.hf_config)
        assert self.settings.backend != "auto", "resolved at start"
        sizes = step_sizes(vllm_config)
        self.backend = make_backend(self.settings.backend, sizes, self.settings.card)
        self.kv_options = self.mapping.kv_cache_options(self.backend.for_card)
        self.encodes_elsewhere = has_encoder_process(vllm_config, self.mapping)
        self.part = loaded_part(vllm_config, self.settings)
        if self.encodes_elsewhere:
            self.part = ModelPart.DECODER
        self.encoder = ProcessEncodeQueue(
            self.mapping.encoder_batch_values, self.settings.encode_timeout_seconds
        )
        self.checkpoint: Path | None = None
        self.ahead = AheadEncoding(None, Ranks())  # until there is a runner
        self.model: SpyreModel[MMUtils]

    # -- start --------------------------------------------------------------------------------

    def init_device(self) -> None:
        """Prepare the backend, join the process group, set the random seed."""
        self.device = torch.device("cpu")
        if is_engine_process():
            read_little_endian()
            self._take_share_of_host()
            if self.backend.for_card:
                export_rank_environment(
                    rank=self.rank,
                    world_size=self.parallel_config.world_size,
                    num_threads=torch.get_num_threads(),
                    engine=self.parallel_config.data_parallel_rank_local or 0,
                )
        self.backend.prepare()
        join_process_group(
            self.parallel_config,
            self.rank,
            self.local_rank,
            self.distributed_init_method,
            self.current_platform.dist_backend,
        )
        if self.rank == 0:  # it shares with the others what arrives
            ensure_ec_transfer_initialized(self.vllm_config)
        set_random_seed(self.model_config.seed)

    def _take_share_of_host(self) -> None:
        if self.settings.num_local_engines > 1:
            engine = self.parallel_config.data_parallel_rank_local
            assert engine is not None, "vLLM numbers data-parallel engines"
            take_share(
                engine=engine,
                num_engines=self.settings.num_local_engines,
                rank=self.rank,
                world_size=self.parallel_config.world_size,
                card=self.backend.for_card,
            )

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the checkpoint, or make random weights up.

        Args:
            load_dummy_weights: make them up, as ``load_format=dummy`` asks for too.

        Raises:
            CheckpointError: the checkpoint does not hold exactly the model's tensors.
        """
        started = time.perf_counter()
        dummy = load_dummy_weights or self.load_config.load_format == "dummy"
        checkpoint = None if dummy else find_checkpoint(self.model_config, self.load_config)
        options = LoadOptions(
            decoder_dtype=self.decoder_dtype,
            encoder_dtype=getattr(torch, self.settings.encoder_dtype),
            for_card=self.backend.for_card,
            group=decoder_group(self.parallel_config.world_size, self.backend.for_card),
            part=self.part,
        )
        # Not in a process that is somebody's own: its weights take more memory for that.
        with mmap_threshold() if is_engine_process() else nullcontext():
            if checkpoint is None:
                fms_model = load_dummy_model(self.mapping, options, self.model_config.seed)
            else:
                fms_model = load_model(self.mapping, checkpoint, options)
            self.model = SpyreModel(fms_model, self.mapping, self.backend, self.part)
        self.checkpoint = checkpoint
        if checkpoint is None:
            logger.warning("The weights are random (load_format=dummy): answers mean nothing")
        what = checkpoint or "random weights"
        logger.info("Loaded %s in %.1f s", what, time.perf_counter() - started)
        probe: Any = WidthProbe(self.mapping.feature_width)
        self.model_runner = probe  # until there is a KV cache
        if has_ec_transfer():
            get_ec_transfer().start_worker_services()

    def get_kv_cache_spec(self) -> "dict[str, KVCacheSpec]":
        """The KV cache of each layer; of none where there is no decoder."""
        if not self.part.has_decoder:
            return {}
        return kv_cache_spec(
            self.kv_options,
            self.geometry.block_size,
            self.decoder_dtype,
            self.parallel_config.world_size,
        )

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Layout of ``kv_cache.KVCache`` in vLLM's letters: layer, block, token, head, content."""
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """Bytes available for this rank's KV cache."""
        return kv_cache_bytes(
            self.vllm_config, self.get_kv_cache_spec(), self.settings.engine_memory_bytes
        )

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take the ``max_model_len`` that vLLM fitted to the memory (``--max-model-len auto``)."""
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: "KVCacheConfig") -> None:
        """Allocate the KV cache and make the runner."""
        if self.part.has_decoder:
            self._allocate_kv_cache(kv_cache_config.num_blocks)
        runner = SpyreModelRunner if self.part.has_decoder else EncoderRunner
        self.model_runner = runner(
            self.vllm_config,
            self.model,
            self.geometry,
            return_mm_embedding=self.settings.enable_return_mm_embedding and self.rank == 0,
            ranks=host_ranks(self.parallel_config.world_size),
        )
        self.ahead = self._ahead_encoding()

    def _ahead_encoding(self) -> AheadEncoding:
        """What encodes beside the steps, on the first rank for all of them."""
        ranks, encoder = self.model_runner.ranks, self.model_runner.encoder
        queue: EncodeQueue = self.encoder
        if not self.encodes_elsewhere:
            dtypes = encoder.dtype, encoder.decoder_dtype
            queue = PiecewiseEncodeQueue(self.model, *dtypes, ranks.num_threads)
        return AheadEncoding(queue if ranks.is_first else None, ranks, self.encodes_elsewhere)

    def _allocate_kv_cache(self, num_blocks: int) -> None:
        with self.backend.without_gradients():
            self.model.kv_cache = allocate_kv_cache(
                self.kv_options,
                num_blocks,
                self.geometry.block_size,
                self.decoder_dtype,
                self.parallel_config.world_size,
            )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile every graph before the first request."""
        started = time.perf_counter()
        num_ranks = self.parallel_config.world_size
        if self.encodes_elsewhere:
            num_threads = leave_threads(all_threads(num_ranks), num_ranks)
        self.model.compile()
        pictures = warm_up(self.model_runner, self.vllm_config)
        if self.encodes_elsewhere and self.rank == 0:
            sizes = step_sizes(self.vllm_config)
            job = encoder_job(self.vllm_config, self.mapping, self.checkpoint, sizes, pictures)
            self.encoder.start(functools.partial(EncoderProcess, job, num_threads))
        if not self.encodes_elsewhere and is_engine_process():
            watch_encoder(self.model, self.settings.encode_timeout_seconds)
        return_free_memory()
        set_random_seed(self.model_config.seed)
        elapsed = time.perf_counter() - started
        logger.info("Warmed up in %.1f s", elapsed)
        return CompilationTimes(language_model=elapsed, encoder=0.0)

    def shutdown(self) -> None:
        """End the encoder's process, if there is one, and what the EC connector has going on."""
        self.ahead.close()
        ensure_ec_transfer_shutdown()

    # -- steps --------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run one step; a request whose images cannot be encoded fails alone, on every rank."""
        with self.backend.without_gradients():
            self.ahead.step(scheduler_output, self.model_runner.encoder_cache)
        try:
            output = self.model_runner.execute_model(scheduler_output)
        except ImageEncodingError as error:
            if self.rank == 0:
                logger.exception("A request fails because its images could not be encoded")
            output = self.model_runner.failed_encoding(scheduler_output, error)
        return None if output is None else self.ahead.attach(output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        return self.ahead.attach(self.model_runner.sample_tokens(grammar_output))

    # -- the rest of vLLM's interface ------------------------------------------------------------

    def get_model(self) -> nn.Module:
        return self.model.fms_model

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def reset_mm_cache(self) -> None:
        """Do nothing: vLLM's engine, not the worker, keeps the processor's outputs."""

    def reset_encoder_cache(self) -> None:
        self.model_runner.reset_encoder_cache()

    def execute_dummy_batch(self) -> None:
        """Do nothing: data-parallel engines do not wait for each other's steps."""
