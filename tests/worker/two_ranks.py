# SPDX-License-Identifier: Apache-2.0
"""Two ranks of a model: processes that talk through Gloo, and do one task after the other."""

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from vllm_spyre_mm.worker.ranks import Ranks

SECONDS = 300

Task = Callable[[Ranks], Any]
"""What a rank does; found by its name in a process that imports its module anew."""

TwoRanks = Callable[[Task], list[Any]]
"""Has both ranks do a task; returns what it gives in each, the first one's first."""


@contextlib.contextmanager
def two_ranks(folder: Path) -> Iterator[TwoRanks]:
    """Start the ranks, which takes seconds, and end them afterwards.

    Args:
        folder: where they find each other.
    """
    context = multiprocessing.get_context("spawn")
    tasks: list[Queue[Task]] = [context.Queue() for _ in range(2)]
    results: Queue[tuple[int, Any]] = context.Queue()
    ranks = [
        context.Process(target=_run, args=(rank, f"file://{folder}/store", tasks[rank], results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()

    def do(task: Task) -> list[Any]:
        for queue in tasks:
            queue.put(task)
        return [result for _, result in sorted(results.get(timeout=SECONDS) for _ in ranks)]

    try:
        yield do
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(rank: int, store: str, tasks: "Queue[Task]", results: "Queue[tuple[int, Any]]") -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with torch.inference_mode():
        while True:
            group = distributed.new_group(backend="gloo")
            results.put((rank, tasks.get()(Ranks(group, num_threads=3))))
