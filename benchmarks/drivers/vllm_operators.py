# SPDX-License-Identifier: Apache-2.0
"""The operators of vLLM's CPU backend, timed one by one; runs in the environment of its wheel."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BLOCK_SIZE = 64


class VllmOperators:
    """Seconds of each operator for given shapes, bf16; argmax in fp32, as vLLM's sampler has it.

    Args:
        model: not used.
        engine: not used.
    """

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        self._cases: dict[str, Callable[[], object]] = {}

    def close(self) -> None:
        """Nothing outlives this process."""

    def measure(
        self, name: str, operator: str, shape: dict[str, Any], repeats: int
    ) -> dict[str, Any]:
        """Make the case at its first call, run it once, and time it.

        Args:
            name: of the case.
            operator: name of a function below.
            shape: its arguments.
            repeats: of the measurement.
        """
        if name not in self._cases:
            self._cases[name] = getattr(self, f"_{operator}")(**shape)
        seconds = []
        with torch.inference_mode():
            self._cases[name]()
            for _ in range(repeats):
                started = time.perf_counter()
                self._cases[name]()
                seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    def forget(self, name: str) -> dict[str, Any]:
        """Drop a case, and its weights."""
        del self._cases[name]
        return {}

    def _linear(
        self, rows: int, width: int, outputs: int, layers: int, gelu: bool
    ) -> Callable[[], object]:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        x = torch.randn(rows, width).bfloat16()
        linears = [nn.Linear(width, outputs, dtype=torch.bfloat16) for _ in range(layers)]
        for linear in linears:
            linear.requires_grad_(False)
            dispatch_cpu_unquantized_gemm(linear, remove_weight=False)

        def run() -> object:
            for linear in linears:
                result = linear.cpu_linear(x, linear.weight, linear.bias)
                if gelu:
                    result = nn.functional.gelu(result, approximate="tanh")
            return result

        return run

    def _attention(
        self, batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int
    ) -> Callable[[], object]:
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, head_dim)
        width = -(-keys // BLOCK_SIZE)
        key_cache, value_cache = _caches(batch * width, kv_heads, head_dim)
        table = torch.randperm(batch * width).int().view(batch, width)
        lengths = torch.full((batch,), keys, dtype=torch.int32)
        starts = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32)
        query = torch.randn(batch * queries, heads, head_dim).bfloat16()
        out = torch.empty_like(query)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=batch,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            seq_lens=lengths,
            dtype=torch.bfloat16,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        return lambda: ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    def _rope(self, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[], object]:
        from vllm import _custom_ops as ops

        query = torch.randn(tokens, heads * head_dim).bfloat16()
        keys = torch.randn(tokens, kv_heads * head_dim).bfloat16()
        table = torch.randn(8192, head_dim).bfloat16()
        positions = torch.arange(tokens)
        return lambda: ops.rotary_embedding(positions, query, keys, head_dim, table, True)

    def _argmax(self, rows: int, width: int) -> Callable[[], object]:
        from vllm.v1.sample.sampler import Sampler

        logits = torch.randn(rows, width)
        return lambda: Sampler.greedy_sample(logits)


def _caches(blocks: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as vLLM's CPU backend lays them out."""
    cache = torch.randn(blocks, kv_heads, 2 * BLOCK_SIZE, head_dim).bfloat16()
    keys, values = cache.chunk(2, dim=2)
    return keys, values
