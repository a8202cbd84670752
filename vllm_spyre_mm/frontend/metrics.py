# SPDX-License-Identifier: Apache-2.0
"""Adds the embeddings to vLLM's metrics, wherever those are exported.

Leans on: ``SchedulerStats`` is a dataclass that the scheduler's ``make_stats`` makes for each step
and ``EngineCoreOutputs`` carries (see ``scheduler.outputs``); ``StatLoggerManager`` makes the
logger for Prometheus by the name ``PrometheusStatLogger`` of ``vllm.v1.metrics.loggers`` and hands
it the statistics of every step. vLLM's entry point for loggers would turn statistics on where the
user turned them off, and knows no offline engine.
"""

from types import ModuleType
from typing import Any

from vllm_spyre_mm.scheduler.outputs import SpyreSchedulerStats
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import is_extended, mark
from vllm_spyre_mm.upstream.module_loading import when_loaded

NAME = "PrometheusStatLogger"

HELD = "vllm:spyre_mm_embedding_held_bytes"
COUNTERS = {
    "encoder_runs": (
        "vllm:spyre_encoder_runs",
        "Images that the vision encoder ran for.",
    ),
    "encoder_cache_hits": (
        "vllm:spyre_encoder_cache_hits",
        "Images whose features were in the encoder cache.",
    ),
    "mm_embeddings_returned": (
        "vllm:spyre_mm_embeddings_returned",
        "Embeddings that were returned with a request's output.",
    ),
}
"""Name and description by field of :class:`SpyreSchedulerStats`."""

REPLACED = ("vllm.v1.metrics.loggers.PrometheusStatLogger",)
"""Attributes of vLLM's that are replaced."""


def install() -> None:
    """Let vLLM make the extended logger as soon as it can make one."""
    when_loaded("vllm.v1.metrics.loggers", _replace_logger)


def _replace_logger(module: ModuleType) -> None:
    require_attributes(module, (NAME, "StatLoggerManager", "create_metric_per_engine"))
    base: Any = getattr(module, NAME)
    if is_extended(base, __name__):
        return
    require_parameters(base.__init__, ("vllm_config", "engine_indexes"))
    require_parameters(base.record, ("scheduler_stats", "engine_idx"))
    require_attributes(base, ("_gauge_cls", "_counter_cls"))
    per_engine = module.create_metric_per_engine
    require_parameters(per_engine, ("metric", "per_engine_labelvalues"))

    class PrometheusStatLogger(base):
        """vLLM's exporter, with a gauge and three counters more."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            labels = self.per_engine_labelvalues
            held = self._gauge_cls(
                name=HELD,
                documentation="Bytes of the embeddings of unfinished requests.",
                multiprocess_mode="mostrecent",
                labelnames=["model_name", "engine"],
            )
            self.gauge_mm_embedding_held = per_engine(held, labels)
            self.counters_mm_embedding = {
                field: per_engine(
                    self._counter_cls(
                        name=name, documentation=text, labelnames=["model_name", "engine"]
                    ),
                    labels,
                )
                for field, (name, text) in COUNTERS.items()
            }

        def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            super().record(scheduler_stats, *args, **kwargs)
            if isinstance(scheduler_stats, SpyreSchedulerStats):
                engine = kwargs.get("engine_idx", 0)
                self.gauge_mm_embedding_held[engine].set(scheduler_stats.mm_embedding_held_bytes)
                for field, counters in self.counters_mm_embedding.items():
                    counters[engine].inc(getattr(scheduler_stats, field))

    setattr(module, NAME, mark(PrometheusStatLogger, __name__))
