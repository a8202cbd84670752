# SPDX-License-Identifier: Apache-2.0
"""Two ranks on two nodes of a Ray cluster, both on this host, give the answers of Transformers.

``make ray`` runs this in an environment that has Ray.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.asks import parity_asks
from tests.e2e.engines import assert_as_transformers, engine, greedy
from tests.reference import Reference

pytest.importorskip("ray", reason="Ray is not installed here: make ray")


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of two nodes with room for a rank each, which an engine finds by its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield
    cluster.shutdown()


class WhereAmI:
    """Extends a worker: the node that it runs on."""

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


@pytest.mark.usefixtures("two_nodes")
def test_ranks_on_two_nodes_equal_transformers(
    llava_next_checkpoint: Path, llava_next_reference: Reference
) -> None:
    asks = parity_asks(6, seed=11)
    with engine(
        llava_next_checkpoint,
        own_process=True,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        max_num_batched_tokens=128,
        worker_extension_cls=f"{WhereAmI.__module__}.{WhereAmI.__qualname__}",
    ) as llm:
        nodes = llm.collective_rpc("node")
        outputs = llm.generate([ask.prompt for ask in asks], greedy(12), use_tqdm=False)
    assert len(set(nodes)) == 2
    assert_as_transformers(outputs, asks, llava_next_reference, 12)
