# SPDX-License-Identifier: Apache-2.0
"""What an engine's configuration becomes, and what is refused before anything starts."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests import architectures
from tests.checkpoints import edit_config
from tests.torch_releases import pytorch_without_internals
from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend import engine_config
from vllm_spyre_mm.model_executor.cpu.tier import compiled_for, cpu_tier


def configure(checkpoint: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=str(checkpoint), **arguments).create_engine_config()


def test_defaults(demo_checkpoint: Path) -> None:
    config = configure(demo_checkpoint)
    assert config.scheduler_config.max_num_batched_tokens == 1536
    assert config.scheduler_config.max_num_seqs == 16
    assert config.cache_config.block_size == 64
    assert (
        config.scheduler_config.scheduler_cls == "vllm_spyre_mm.scheduler.scheduler.SpyreScheduler"
    )
    assert config.parallel_config.worker_cls == "vllm_spyre_mm.worker.worker.SpyreWorker"
    assert config.scheduler_config.async_scheduling is False
    assert config.cache_config.enable_prefix_caching
    settings = SpyreSettings.from_vllm_config(config)
    assert settings.resolved
    assert settings.backend == "inductor"
    assert not settings.enable_return_mm_embedding


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a configuration logs."""
    lines: list[str] = []

    def log(level: int, message: str, *arguments: object) -> None:
        lines.append(f"{logging.getLevelName(level)}: {message % arguments}")

    monkeypatch.setattr(engine_config.logger, "log", log)
    monkeypatch.setattr(engine_config.logger, "warning", partial(log, logging.WARNING))
    return lines


def test_a_start_says_what_is_compiled_for_what(demo_checkpoint: Path, said: list[str]) -> None:
    configure(demo_checkpoint)
    (line,) = said
    assert line.startswith("INFO: Spyre platform: ")
    assert f"cpu_tier={cpu_tier()}, compiled_for={compiled_for()}, " in line
    said.clear()
    configure(demo_checkpoint, enforce_eager=True)
    assert "compiled_for=nothing, " in said[0]


def test_a_pytorch_that_cannot_compile_runs_eagerly_and_says_so(
    demo_checkpoint: Path, said: list[str]
) -> None:
    with pytorch_without_internals():
        config = configure(demo_checkpoint)
        with pytest.raises(ValueError, match="leans on parts of PyTorch that the installed"):
            configure(demo_checkpoint, additional_config={"backend": "inductor"})
    assert SpyreSettings.from_vllm_config(config).backend == "eager"
    warning, summary = said
    assert warning.startswith(f"WARNING: PyTorch {torch.__version__} has no torch._dynamo.")
    assert "compiled_for=nothing, " in summary


@pytest.mark.parametrize("eager", [False, True])
def test_a_lower_tier_than_pytorch_can_be_told_is_warned_of(
    demo_checkpoint: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, eager: bool
) -> None:
    monkeypatch.setattr(engine_config, "takes_architecture", lambda: False)
    monkeypatch.setattr(engine_config, "detect_tier", lambda: "amx")
    monkeypatch.setattr(engine_config, "cpu_tier", lambda: "avx2")
    configure(demo_checkpoint, enforce_eager=eager)
    assert len(said) == (1 if eager else 2)
    if not eager:
        assert said[0].startswith("WARNING: SPYRE_MM_CPU_TIER=avx2: PyTorch ")
        assert "compiles graphs for the machine at hand" in said[0]


def test_a_release_that_nobody_tried_is_warned_of(
    demo_checkpoint: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_config, "untested_versions", lambda: ["vllm 9 is newer than any"])
    config = configure(demo_checkpoint)
    assert said[0] == (
        "WARNING: vllm 9 is newer than any: it has all that is leant on, and may differ elsewhere"
    )
    said.clear()
    dataclasses.replace(config)  # as vLLM does in every process
    assert [line.partition(":")[0] for line in said] == ["DEBUG"]


def test_spyres_block_size_may_be_said(demo_checkpoint: Path) -> None:
    assert configure(demo_checkpoint, block_size=64).cache_config.block_size == 64


def test_a_configuration_that_vllm_builds_anew_is_accepted(demo_checkpoint: Path) -> None:
    """vLLM does so for a part of a model, in every process."""
    config = configure(demo_checkpoint)
    again = dataclasses.replace(config)
    assert again.cache_config.block_size == 64
    assert again.additional_config == config.additional_config


def test_both_encoder_bounds_hold_a_whole_prompt(demo_checkpoint: Path) -> None:
    config = configure(demo_checkpoint, max_model_len=4096)
    assert config.scheduler_config.encoder_cache_size == 4096
    assert config.scheduler_config.max_num_encoder_input_tokens == 4096
    config = configure(
        demo_checkpoint, max_model_len=4096, additional_config={"encoder_cache_tokens": 10000}
    )
    assert config.scheduler_config.encoder_cache_size == 10000


def test_a_length_that_the_checkpoint_allows_is_bounded(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    granite = shutil.copytree(demo_checkpoint, tmp_path / "granite")
    edit_config(granite, text_config__max_position_embeddings=131072)
    assert configure(granite).model_config.max_model_len == 8192
    assert configure(granite, max_model_len=16384).model_config.max_model_len == 16384


@pytest.mark.parametrize("stored", ["float16", "float32", "bfloat16"])
def test_every_stored_dtype_is_served_in_the_hosts_fastest(
    demo_checkpoint: Path, tmp_path: Path, stored: str
) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / stored)
    edit_config(checkpoint, dtype=stored)
    from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

    config = configure(checkpoint)
    assert config.model_config.dtype == host_dtypes()[0]
    assert configure(checkpoint, dtype="float32").model_config.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {"enforce_eager": True},
        {"additional_config": {"backend": "eager"}},
        {"additional_config": {"backend": "inductor"}},
    ],
    ids=str,
)
def test_the_cpu_beside_a_card_takes_its_own_dtype(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    """Where the card's compiler can be imported, vLLM is told of the card's float16 alone."""
    from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "e2e" / "stand_in"))
    assert configure(demo_checkpoint).model_config.dtype == torch.float16
    assert configure(demo_checkpoint, **arguments).model_config.dtype == host_dtypes()[0]
    asked = configure(demo_checkpoint, dtype="float32", **arguments)
    assert asked.model_config.dtype == torch.float32
    with pytest.raises(ValueError, match="not supported by the CPU's backends: use --dtype"):
        configure(demo_checkpoint, dtype="float16", **arguments)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The stand-in can be imported, in an environment as an image for the card makes it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "e2e" / "stand_in"))
    monkeypatch.setenv("FLEX_COMPUTE", "SENTIENT")
    monkeypatch.setenv("FLEX_DEVICE", "PF")
    return monkeypatch


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the module warns of; vLLM's loggers do not propagate to pytest's handler."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    engine_config.logger.addHandler(handler)
    yield said
    engine_config.logger.removeHandler(handler)


def test_the_limit_in_the_environment_is_the_cards_bound(
    demo_checkpoint: Path, card: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    card.setenv("VLLM_DT_MAX_BATCH_TKV_LIMIT", "24576")
    config = configure(demo_checkpoint)
    assert SpyreSettings.from_vllm_config(config).max_batch_tkv == 24576
    again = dataclasses.replace(config)
    assert SpyreSettings.from_vllm_config(again).max_batch_tkv == 24576
    configure(demo_checkpoint, additional_config={"max_batch_tkv": 24576})
    assert not warnings
    config = configure(demo_checkpoint, additional_config={"max_batch_tkv": 28672})
    assert SpyreSettings.from_vllm_config(config).max_batch_tkv == 28672
    assert warnings == [
        "max_batch_tkv=28672 is taken, not VLLM_DT_MAX_BATCH_TKV_LIMIT=24576 of the environment"
    ]


def test_the_limit_in_the_environment_is_nothing_to_a_cpu(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = SpyreSettings.from_vllm_config(configure(demo_checkpoint)).max_batch_tkv
    monkeypatch.setenv("VLLM_DT_MAX_BATCH_TKV_LIMIT", "24576")
    assert SpyreSettings.from_vllm_config(configure(demo_checkpoint)).max_batch_tkv == expected


def test_a_runtime_that_takes_no_card_is_warned_of(
    demo_checkpoint: Path, card: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    card.setenv("FLEX_COMPUTE", "SENULATOR")
    card.delenv("FLEX_DEVICE")
    config = configure(demo_checkpoint)
    dataclasses.replace(config)  # says nothing again
    assert warnings == [
        "the runtime of the card may not take a card: a simulator, and no card (FLEX_COMPUTE is "
        "SENULATOR, FLEX_DEVICE not set)"
    ]


@pytest.mark.usefixtures("card")
def test_a_context_that_the_card_has_no_programs_for_is_refused(demo_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="none of 2048 tokens or more has whole chunks of 640"):
        configure(demo_checkpoint, max_num_batched_tokens=640, max_model_len=2048)
    assert configure(demo_checkpoint, max_model_len=1000).model_config.max_model_len == 1000


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (3600, 3600)),
        ({"distributed_timeout_seconds": 60}, (60, 60)),
        ({"cpu_distributed_timeout_seconds": 60}, (3600, 60)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("card")
def test_ranks_of_cards_wait_for_each_others_compiler(
    demo_checkpoint: Path, given: dict[str, int], expected: tuple[int, int]
) -> None:
    parallel = configure(demo_checkpoint, **given).parallel_config
    timeouts = (parallel.distributed_timeout_seconds, parallel.cpu_distributed_timeout_seconds)
    assert timeouts == expected


def test_ranks_of_a_cpu_wait_as_long_as_vllm_says(demo_checkpoint: Path) -> None:
    parallel = configure(demo_checkpoint).parallel_config
    assert parallel.distributed_timeout_seconds is None
    assert parallel.cpu_distributed_timeout_seconds is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA": ({"enable_lora": True}, "LoRA"),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding",
    ),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "fp16 on a CPU": (
        {"dtype": "float16"},
        "dtype='float16' is not supported by the CPU's backends",
    ),
    "block size": ({"block_size": 32}, "block-size=32"),
    "vLLM's own block size": ({"block_size": 16}, "block-size=16"),
    "chunk size": ({"max_num_batched_tokens": 100}, "multiple of 64, got 100"),
    "unknown setting": ({"additional_config": {"chunk": 3}}, "chunk: Extra inputs"),
    "setting of another type": (
        {"enable_return_mm_embedding": "yes"},
        "enable_return_mm_embedding: Input should be a valid boolean",
    ),
    "scheduler class": (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        "a scheduler of your own",
    ),
    "no chunks": (
        {"enable_chunked_prefill": False, "max_model_len": 512},
        "prefill without chunks",
    ),
    "sleep mode": ({"enable_sleep_mode": True}, "[sS]leep mode"),
    "pooling": ({"runner": "pooling", "convert": "embed"}, "runner='pooling'"),
    "KV cache dtype": ({"kv_cache_dtype": "fp8"}, "kv-cache-dtype='fp8"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "prompt embeddings"),
    "short steps": ({"max_num_scheduled_tokens": 64}, "max-num-scheduled-tokens=64"),
    "short chunks": ({"long_prefill_token_threshold": 100}, "long-prefill-token-threshold=100"),
    "Transformers' model": ({"model_impl": "transformers"}, "model-impl='transformers'"),
    "no tokenizer": ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
    "lists within lists": (
        {"mm_processor_kwargs": {"image_grid_pinpoints": [[96, 96]]}},
        "mm-processor-kwargs with a list or an object inside another",
    ),
    "image processing on a device": (
        {"mm_processor_kwargs": {"device": "cuda"}},
        "image processing on a device",
    ),
    "attention backend": ({"attention_backend": "FLASH_ATTN"}, "--attention-backend"),
    "offloaded weights": ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    "KV offloading": ({"kv_offloading_size": 1.0}, "KV offloading|KV transfer"),
    "pickled weights": ({"load_format": "pt"}, "load-format='pt'"),
    "devices": ({"device_ids": "0"}, r"a choice of devices \(--device-ids\)"),
    "worker class": ({"worker_cls": "some.Worker"}, "a worker of your own"),
    "Ray, where it is not installed": ({"distributed_executor_backend": "ray"}, "import Ray"),
    "profiler": (
        {"profiler_config": {"profiler": "torch", "torch_profiler_dir": "/nowhere"}},
        "--profiler-config",
    ),
    "eager and inductor": (
        {"enforce_eager": True, "additional_config": {"backend": "inductor"}},
        "contradict each other",
    ),
    "a card that is not there": (
        {"additional_config": {"backend": "sendnn"}},
        "needs the package torch_sendnn",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_with_a_sentence(demo_checkpoint: Path, what: str) -> None:
    arguments, sentence = REFUSED[what]
    with pytest.raises(ValueError, match=sentence):
        configure(demo_checkpoint, **arguments)


def test_ray_is_for_cpus(demo_checkpoint: Path) -> None:
    """vLLM refuses it before, where it is not installed."""
    parallel = configure(demo_checkpoint).parallel_config
    parallel.distributed_executor_backend = "ray"
    engine_config._check_executor(SpyreSettings(backend="inductor"), parallel)
    with pytest.raises(ValueError, match="cards exchange within one host"):
        engine_config._check_executor(SpyreSettings(backend="sendnn"), parallel)


def test_quantised_checkpoints_are_refused(demo_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "quantised")
    edit_config(checkpoint, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="quantised checkpoints"):
        configure(checkpoint)


def test_a_model_that_nothing_serves_is_refused_by_name(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "dinov2")
    edit_config(checkpoint, vision_config={"model_type": "dinov2"})
    with pytest.raises(ValueError, match=r"dinov2.*Supported: GraniteVision"):
        configure(checkpoint)


def test_a_text_model_needs_no_multimodal_configuration(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "text")
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    config["architectures"] = ["GraniteForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    vllm_config = configure(checkpoint)
    assert vllm_config.model_config.multimodal_config is None
    assert SpyreSettings.from_vllm_config(vllm_config).resolved


def test_what_vllm_leaves_to_its_own_mistral_3_is_not_left_to_it(tmp_path: Path) -> None:
    """Its class would normalise the pixels. It does not run here."""
    config = architectures.mistral3(architectures.mistral())
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    multimodal = configure(checkpoint).model_config.multimodal_config
    assert multimodal is not None
    assert multimodal.mm_device_do_normalize is False
    with pytest.raises(ValueError, match=r"--enable-mm-embeds.*not supported for Mistral3"):
        configure(checkpoint, enable_mm_embeds=True)


def test_a_width_that_cannot_be_divided_among_the_ranks_is_refused(tmp_path: Path) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.llama(intermediate_size=301))
    with pytest.raises(ValueError, match="does not divide the model's intermediate_size, 301"):
        configure(checkpoint, tensor_parallel_size=2)
