# SPDX-License-Identifier: Apache-2.0
"""From the ``LLM(...)`` call to the first answer, and the memory that an engine takes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import SMALL
from benchmarks.measure import Figure, Row, compare, constant
from benchmarks.process import Driver
from benchmarks.serving import ENGINE, WORKLOAD
from vllm_spyre_mm.config import HOST_CHUNK_SIZE
from vllm_spyre_mm.demo import checkpoint_path

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
IMPORTS = (
    "fms.models",
    "torch._inductor.compile_fx",
    "vllm.v1.engine.core",
    "vllm_spyre_mm.worker.worker",
    "vllm.model_executor.models.llava_next",
)
"""The engine runs in the measured process, and its imports are done before the clock starts."""


def start_rows() -> Iterator[Row]:
    """The embedded checkpoint with an empty compile cache, and then with a full one."""
    imports = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**IN_PROCESS, "TORCHINDUCTOR_CACHE_DIR": cache}
        for name in ("cold compile cache", "warm compile cache"):
            with Driver(
                checkpoint_path(), environment=environment, imports=IMPORTS, **ENGINE
            ) as driver:
                answer = driver.ask("workload", requests=1, max_tokens=1, seed=0)
            imports.append(driver.start["import_seconds"])
            seconds = driver.start["start_seconds"] + answer["seconds"]
            name = f"LLM(...) to the first answer, {name}"
            yield Row("start", name, constant(seconds), figure=Figure.VALUE)
    yield Row("start", "imports", constant(imports), figure=Figure.VALUE)


def memory_row(checkpoint: Path) -> Row:
    """Peak of the memory that no file backs, over what there is after the imports, in bytes."""
    with Driver(
        checkpoint,
        environment=IN_PROCESS,
        imports=IMPORTS,
        **ENGINE,
        kv_cache_memory_bytes=_kv_cache_bytes(),
    ) as driver:
        answer = driver.ask("workload", **WORKLOAD, seed=0)
    weights = (checkpoint / "model.safetensors").stat().st_size
    expected = weights + _kv_cache_bytes() + _activation_bytes()
    return compare(
        "memory",
        "peak above imports (bytes)",
        constant(float(answer["peak_bytes"])),
        constant(float(expected)),
        "weights, KV cache, a chunk's activations",
    )


def _kv_cache_bytes() -> int:
    """What the workload fills: four requests of less than 1,408 tokens, and block 0."""
    width, _, heads, kv_heads, layers = SMALL.text
    return (4 * 22 + 1) * 64 * 2 * 2 * layers * kv_heads * (width // heads)


def _activation_bytes() -> int:
    """Of a chunk in one layer: residual, norm, projections, attention, feed-forward."""
    width, inner, heads, kv_heads, _ = SMALL.text
    kv_width = width // heads * kv_heads
    return 2 * HOST_CHUNK_SIZE * (4 * width + 2 * kv_width + 3 * inner + 2 * width)
