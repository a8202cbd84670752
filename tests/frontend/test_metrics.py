# SPDX-License-Identifier: Apache-2.0
"""The statistics travel with vLLM's, and vLLM's own exporter shows them."""

from types import ModuleType, SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from vllm.v1.engine import EngineCoreOutputs as VllmEngineCoreOutputs
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_spyre_mm.frontend import metrics
from vllm_spyre_mm.frontend.engine_output import EngineCoreOutputs
from vllm_spyre_mm.scheduler.outputs import SpyreSchedulerStats
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.upstream.marks import is_extended

STATS = SpyreSchedulerStats(
    num_running_reqs=3,
    mm_embedding_held_bytes=4096,
    encoder_runs=2,
    encoder_cache_hits=5,
    mm_embeddings_returned=1,
)


def through_the_wire(stats: SchedulerStats, container: type) -> Any:
    message = VllmEngineCoreOutputs(scheduler_stats=stats)
    frames = [bytearray(buffer) for buffer in MsgpackEncoder().encode(message)]
    return MsgpackDecoder(container).decode(frames).scheduler_stats


def test_they_travel_with_a_step():
    assert through_the_wire(STATS, EngineCoreOutputs) == STATS


def test_plain_statistics_count_nothing():
    received = through_the_wire(SchedulerStats(num_running_reqs=2), EngineCoreOutputs)
    assert received == SpyreSchedulerStats(num_running_reqs=2)


def test_vllms_own_decoder_takes_what_it_knows():
    received = through_the_wire(STATS, VllmEngineCoreOutputs)
    assert type(received) is SchedulerStats
    assert received.num_running_reqs == 3


class Metric:
    """Of prometheus_client, as far as vLLM's exporter uses it."""

    def __init__(self, name: str, labelnames: list[str], **_: Any) -> None:
        self.name, self.labelnames = name, labelnames
        self.values: dict[str, float] = {}

    def labels(self, model: str, engine: str) -> Any:
        assert self.labelnames == ["model_name", "engine"]
        self.values.setdefault(engine, 0)
        return SimpleNamespace(
            set=lambda value: self.values.__setitem__(engine, value),
            inc=lambda value: self.values.__setitem__(engine, self.values[engine] + value),
        )


def module_with(base: type) -> ModuleType:
    module = ModuleType("loggers")
    module.PrometheusStatLogger = base  # type: ignore[attr-defined]
    module.StatLoggerManager = loggers.StatLoggerManager  # type: ignore[attr-defined]
    module.create_metric_per_engine = loggers.create_metric_per_engine  # type: ignore[attr-defined]
    return module


def test_gauge_and_counters_by_engine():
    made: list[Metric] = []

    def make(**arguments: Any) -> Metric:
        made.append(Metric(**arguments))
        return made[-1]

    class Base:
        _gauge_cls = _counter_cls = staticmethod(make)

        def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
            self.per_engine_labelvalues = {index: ["m", str(index)] for index in engine_indexes}
            self.recorded: list[Any] = []

        def record(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int = 0) -> None:
            self.recorded.append(scheduler_stats)

    module = module_with(Base)
    metrics._replace_logger(module)
    logger = module.PrometheusStatLogger(None, [0, 1])
    for stats, engine in ((STATS, 1), (None, 0), (STATS, 1), (SchedulerStats(), 0)):
        logger.record(stats, None, engine_idx=engine)
    assert len(logger.recorded) == 4
    values = {metric.name: metric.values for metric in made}
    assert values == {
        "vllm:spyre_mm_embedding_held_bytes": {"0": 0, "1": 4096},
        "vllm:spyre_encoder_runs": {"0": 0, "1": 4},
        "vllm:spyre_encoder_cache_hits": {"0": 0, "1": 10},
        "vllm:spyre_mm_embeddings_returned": {"0": 0, "1": 2},
    }
    replaced = module.PrometheusStatLogger
    metrics._replace_logger(module)
    assert module.PrometheusStatLogger is replaced


def test_vllms_logger_is_replaced_and_its_names_are_free_again_for_the_next_engine():
    metrics.install()
    assert is_extended(loggers.PrometheusStatLogger, metrics.__name__)
    loggers.unregister_vllm_metrics()  # of an engine that ran in this process
    registry = prometheus_client.REGISTRY
    for name, _ in metrics.COUNTERS.values():
        prometheus_client.Counter(name, "of an engine before")
    loggers.unregister_vllm_metrics()
    assert not [name for name in registry._names_to_collectors if "spyre" in name]


def test_a_logger_without_its_classes_is_refused_by_name():
    class Base:
        def __init__(self, vllm_config: Any, engine_indexes: Any) -> None: ...

        def record(self, scheduler_stats: Any, engine_idx: int) -> None: ...

    with pytest.raises(UnsupportedVllmError, match="_gauge_cls"):
        metrics._replace_logger(module_with(Base))
