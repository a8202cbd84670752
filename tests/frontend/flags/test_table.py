# SPDX-License-Identifier: Apache-2.0
"""Every field of vLLM's configuration is decided, and what is refused is refused by name."""

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import vllm.config
from vllm.config import ECTransferConfig, VllmConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_spyre_mm.frontend.engine_args import KEYWORD
from vllm_spyre_mm.frontend.flags import OTHER_FLAGS, TABLE, refuse_unsupported
from vllm_spyre_mm.frontend.flags.decision import Decisions, Refused
from vllm_spyre_mm.upstream.releases import LATER_FIELDS


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    transfer = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_both")
    arguments = EngineArgs(model=str(demo_checkpoint), ec_transfer_config=transfer)
    return arguments.create_engine_config()


def by_path(value: object) -> str:
    return value.path or "engine" if isinstance(value, Decisions) else str(value)


@pytest.mark.parametrize("decisions", TABLE, ids=by_path)
def test_every_field_is_decided_once(decisions: Decisions, vllm_config: VllmConfig) -> None:
    """A field that a new vLLM adds fails here until it is decided; so does one that it drops."""
    config = decisions.of(vllm_config)
    fields = {field.name for field in dataclasses.fields(type(config))}
    decided = Counter(decisions.fields())
    later = set(LATER_FIELDS.get(decisions.path, ()))
    assert later <= decided.keys()
    assert not {name for name, count in decided.items() if count > 1}
    computed = {refused.field for refused in decisions.refused if refused.field not in fields}
    assert decided.keys() - computed - later == fields - later
    assert all(hasattr(config, name) for name in computed)


def test_an_older_release_lacks_all_of_the_later_fields(vllm_config: VllmConfig) -> None:
    """Or it has all of them: an entry of one field that came earlier would hide its loss."""
    has = {
        hasattr(decisions.of(vllm_config), name)
        for decisions in TABLE
        for name in LATER_FIELDS.get(decisions.path, ())
    }
    assert len(has) == 1
    assert LATER_FIELDS.keys() <= {decisions.path for decisions in TABLE}


def test_every_class_of_the_configuration_is_in_the_table(vllm_config: VllmConfig) -> None:
    """Field by field, or as a whole by the one field of ``VllmConfig`` that it is."""
    paths = {decisions.path.split(".")[0] for decisions in TABLE}
    (engine,) = (decisions for decisions in TABLE if not decisions.path)
    for field in dataclasses.fields(VllmConfig):
        if field.name not in paths:
            assert field.name in engine.fields()
    assert isinstance(vllm_config.model_config.multimodal_config, MultiModalConfig)


def test_every_flag_is_decided() -> None:
    """``EngineArgs`` has flags that are no field by the same name."""
    classes = [
        each
        for each in vars(vllm.config).values()
        if isinstance(each, type) and dataclasses.is_dataclass(each)
    ]
    fields = {field.name for each in classes for field in dataclasses.fields(each)}
    flags = {field.name for field in dataclasses.fields(EngineArgs)} - {KEYWORD}
    others = [name for names in OTHER_FLAGS.values() for name in names]
    assert len(others) == len(set(others))
    assert flags - fields == set(others)


DEVICES = "assigned_physical_gpu_ids"

VALUES: dict[str, Any] = {
    "attention_config.backend": "FLASH_ATTN",
    "aux_output_config.enable_return_routed_experts": True,
    "cache_dtype": "fp8",
    "config_format": "mistral",
    "data_parallel_backend": "ray",
    "disable_chunked_mm_input": True,
    "distributed_executor_backend": "external_launcher",
    "ec_manager_config.encoder_cache_manager_cls": "a.B",
    "enable_chunked_prefill": False,
    "load_format": "pt",
    "long_prefill_token_threshold": 64,
    "max_num_scheduled_tokens": 64,
    "mm_encoder_tp_mode": "data",
    "mm_processor_kwargs": {"image_grid_pinpoints": [[96, 96]]},
    "ec_connector": "ECCPUConnector",
    "model_impl": "transformers",
    "offload_config.offload_backend": "uva",
    "prefix_match_unit": 16,
    "profiler_config.profiler": "torch",
    "safetensors_load_strategy": "torchao",
    "scheduler_cls": "a.B",
    "worker_cls": "a.B",
}
"""Values that are refused, where another than 2 is needed to see it."""


def set_copy(owner: Any, path: str, value: Any) -> Any:
    """A shallow copy in which the attribute at a dotted path has a value."""
    changed, (name, _, rest) = copy.copy(owner), path.partition(".")
    object.__setattr__(
        changed, name, set_copy(getattr(changed, name), rest, value) if rest else value
    )
    return changed


REFUSALS = [
    (decisions, refused)
    for decisions in TABLE
    for refused in decisions.refused
    # What vLLM computes, or what depends on two fields: tests/frontend/test_engine_config.py.
    if refused.field not in ("runner_type", "use_v2_model_runner", "block_size", DEVICES)
    and "on a device" not in refused.what
]


@pytest.mark.parametrize(
    ("decisions", "refused"), REFUSALS, ids=[refused.field for _, refused in REFUSALS]
)
def test_what_is_not_supported_is_refused_by_name(
    decisions: Decisions, refused: Refused, vllm_config: VllmConfig
) -> None:
    refuse_unsupported(vllm_config)
    place, value = refused.field, 2
    for name, other in VALUES.items():
        if name.split(".")[0] == refused.field:
            place, value = name, other
    config = set_copy(vllm_config, ".".join(filter(None, (decisions.path, place))), value)
    with pytest.raises(ValueError, match="not supported on Spyre: ") as raised:
        refuse_unsupported(config)
    assert str(raised.value).endswith(refused.what.format(value=value))


def test_ray_is_for_one_engine(vllm_config: VllmConfig) -> None:
    config = set_copy(vllm_config, "parallel_config.distributed_executor_backend", "ray")
    refuse_unsupported(config)
    with pytest.raises(ValueError, match="distributed-executor-backend='ray'"):
        refuse_unsupported(set_copy(config, "parallel_config.data_parallel_size", 2))


@pytest.mark.parametrize("name", ["max_num_scheduled_tokens", "long_prefill_token_threshold"])
def test_a_threshold_that_cuts_no_chunk_is_allowed(vllm_config: VllmConfig, name: str) -> None:
    chunk = vllm_config.scheduler_config.max_num_batched_tokens
    refuse_unsupported(set_copy(vllm_config, f"scheduler_config.{name}", chunk))


@pytest.mark.parametrize(
    "allowed",
    [{"size": {"longest_edge": 96}}, {"crop": [1, 2]}, {"a": 1, "b": None}, {"c": ("x", (1, 2))}],
    ids=str,
)
def test_settings_of_the_processor_that_vllm_can_hash_are_allowed(
    vllm_config: VllmConfig, allowed: dict[str, Any]
) -> None:
    path = "model_config.multimodal_config.mm_processor_kwargs"
    refuse_unsupported(set_copy(vllm_config, path, allowed))


@pytest.mark.parametrize(
    "refused", [{"size": {"a": [1]}}, {"size": {"a": {"b": 1}}}, {"c": ([1],)}], ids=str
)
def test_settings_of_the_processor_that_vllm_cannot_hash_are_refused(
    vllm_config: VllmConfig, refused: dict[str, Any]
) -> None:
    path = "model_config.multimodal_config.mm_processor_kwargs"
    with pytest.raises(ValueError, match="mm-processor-kwargs with a list or an object"):
        refuse_unsupported(set_copy(vllm_config, path, refused))
