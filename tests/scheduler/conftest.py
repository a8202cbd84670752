# SPDX-License-Identifier: Apache-2.0
"""Schedulers of an engine with small chunks and four rows."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig
from vllm.config.scheduler import SchedulerPolicy

from tests.scheduler.simulation import Simulation, make_config, make_scheduler
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler


@pytest.fixture(scope="module")
def vllm_config(demo_checkpoint: Path) -> VllmConfig:
    return make_config(
        demo_checkpoint, enable_return_mm_embedding=True, settings={"max_batch_tkv": 2048}
    )


@pytest.fixture(scope="module")
def vllm_config_ahead(demo_checkpoint: Path) -> VllmConfig:
    """As ``vllm_config``, with images that are encoded ahead of time."""
    return make_config(
        demo_checkpoint,
        encode_ahead=True,
        enable_return_mm_embedding=True,
        settings={"max_batch_tkv": 2048},
    )


@pytest.fixture(scope="module")
def make(vllm_config: VllmConfig, vllm_config_ahead: VllmConfig) -> Callable[..., SpyreScheduler]:
    """Makes a scheduler of a size, a bound on batch × length, and a policy.

    (A function, because Hypothesis cannot print a configuration.)
    """

    def make(
        num_blocks: int, bound: int, policy: SchedulerPolicy = "fcfs", encode_ahead: bool = False
    ) -> SpyreScheduler:
        config = vllm_config_ahead if encode_ahead else vllm_config
        config.scheduler_config.policy = policy
        try:
            scheduler = make_scheduler(config, num_blocks)
        finally:
            config.scheduler_config.policy = "fcfs"
        scheduler.geometry = dataclasses.replace(scheduler.geometry, max_batch_tkv=bound)
        return scheduler

    return make


@pytest.fixture
def scheduler(vllm_config: VllmConfig) -> SpyreScheduler:
    return make_scheduler(vllm_config)


@pytest.fixture
def simulation(vllm_config: VllmConfig) -> Simulation:
    """Of a scheduler with room for several prompts, of the configuration of the test's module."""
    return Simulation(make_scheduler(vllm_config, num_blocks=200))


@pytest.fixture
def no_blocks_left(vllm_config: VllmConfig) -> Iterator[None]:
    """Of a test's scheduler, in the configuration that all of them share."""
    yield
    vllm_config.cache_config.num_gpu_blocks = None
