# SPDX-License-Identifier: Apache-2.0
"""Compilation with Inductor: one graph for an encoder's repeated blocks, one for a decoder's.

PyTorch's internals are imported where something is compiled, and nowhere else.
"""

import contextlib
import contextvars
import functools
import linecache
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.cpu.linear_fusion import replace_norms

MAX_COMPILE_THREADS = 4
"""Processes that compile kernels in parallel; a graph has about as many kernels."""


def compile_encoder_blocks(blocks: nn.ModuleList) -> None:
    """Compile the repeated blocks of an encoder for the CPU, in place; one graph serves all.

    The number of positions is dynamic; so are that of tiles, if the first call has several, and the
    length of a vector.
    """
    from vllm_spyre_mm.model_executor.cpu.shared_graph import share_graph

    replace_norms(blocks)
    share_graph(blocks, _mark_positions_dynamic)


def compile_decoder_blocks(blocks: nn.ModuleList) -> None:
    """Compile the repeated blocks of a decoder for the CPU, in place; one graph serves all.

    Only the number of tokens is dynamic: each further symbol costs time at every call.
    """
    from vllm_spyre_mm.model_executor.cpu.shared_graph import share_graph

    replace_norms(blocks)
    share_graph(blocks, _mark_tokens_dynamic)


def _mark_tokens_dynamic(inputs: dict[str, Any]) -> None:
    for name in ("x", "position_ids", "slot_mapping"):
        torch._dynamo.mark_dynamic(inputs[name], 1)


def _mark_positions_dynamic(inputs: dict[str, Any]) -> None:
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor):
            for dim, size in enumerate(tensor.shape[: max(1, tensor.dim() - 1)]):
                if size > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)


@functools.cache
def prepare_cpu_compiler() -> Future[None]:
    """Start the compiler's one-time preparation in a thread.

    It waits for other programs and reads files, which overlaps with reading weights.
    """
    # Imported here: two threads that import PyTorch's modules interfere with each other.
    from torch._inductor import config
    from torch._inductor.codecache import CacheBase
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def prepare() -> None:
        with config.patch({"cpp.vec_isa_ok": True} if _compiler_knows_cpu() else {}):
            pick_vec_isa()
        CacheBase.get_system()  # hashes Triton's files, where it is installed

    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, wait=False)
        return pool.submit(prepare)


@contextlib.contextmanager
def cpu_compile_context(kernels: Sequence[Callable[[], object]] = ()) -> Iterator[None]:
    """Context in which the CPU's graphs are compiled; a second start finds them on disk.

    Args:
        kernels: functions that each compile a C++ kernel. They are called in threads beside the
            context's body, so that a kernel's first use finds it compiled or waits for it. An error
            appears at the first use.
    """
    from torch._dynamo import config as dynamo_config
    from torch._inductor import config
    from torch._inductor.async_compile import shutdown_compile_workers

    # The keys of compiled kernels contain the instruction sets. Threads that detect these at the
    # same time interfere with each other.
    prepare_cpu_compiler().result()
    # A module's floats, such as an epsilon, become constants; only lengths vary.
    with (
        config.patch(compile_threads=min(MAX_COMPILE_THREADS, os.cpu_count() or 1)),
        dynamo_config.patch(specialize_float=True),
        ThreadPoolExecutor() as pool,
    ):
        sources = set(linecache.cache)
        for kernel in kernels:
            pool.submit(contextvars.copy_context().run, kernel)  # with these settings
        try:
            yield
        finally:
            shutdown_compile_workers()
            for file in linecache.cache.keys() - sources:  # 5 MB of Dynamo's traced sources
                del linecache.cache[file]


def _compiler_knows_cpu() -> bool:
    """Whether the C++ compiler accepts the flags of every instruction set that Inductor may use.

    Inductor builds and runs a program for each, which takes seconds; this takes milliseconds.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    if platform.machine() != "x86_64":
        return False
    flags = ["-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512vnni"]
    command = [get_cpp_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
