# SPDX-License-Identifier: Apache-2.0
"""A graph pass that fuses RoPE, the store to the KV cache and attention into one operator.

FMS calls them one after the other. Fused, a layer of a decode makes one call into C++ with one
parallel region instead of three.
"""

import operator

import torch
from torch import fx

from vllm_spyre_mm.model_executor.cpu import attention
from vllm_spyre_mm.model_executor.cpu.kernels import paged_decode, rope
from vllm_spyre_mm.model_executor.cpu.kernels.operands import NewKV, PagedKV, RopeAngles
from vllm_spyre_mm.model_executor.cpu.operators import define_operator, shape_of_first


def fuse_attention(graph_module: fx.GraphModule) -> None:
    """Fuse each RoPE with the store and the attention that use its results, in place.

    Args:
        graph_module: of a decoder's block, as Dynamo gives it to a compiler. Other patterns (no
            RoPE, or not the compiled one) are left as they are.
    """
    rope.define_rope()
    attention.define_attention()
    _define_op()
    ops = torch.ops.spyre_mm
    for rope_node in graph_module.graph.find_nodes(op="call_function", target=ops.rope):
        parts = {node.args[1]: node for node in rope_node.users if node.target is operator.getitem}
        users = [user for part in parts.values() for user in part.users]
        stores = [user for user in users if user.target is ops.paged_store]
        attends = [user for user in users if user.target is ops.paged_attention]
        if len(parts) == 2 and len(users) == 2 and len(stores) == len(attends) == 1:
            _fuse(graph_module.graph, rope_node, stores[0], attends[0])
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _fuse(graph: fx.Graph, rope_node: fx.Node, store: fx.Node, attend: fx.Node) -> None:
    query, keys, position_ids, table = rope_node.args
    _, values, key_cache, value_cache, slot_mapping = store.args
    _, _, _, kv_blocks, kv_lengths, query_lengths, scale, compiled = attend.args
    if not compiled or attend.args[1:3] != (key_cache, value_cache):
        return
    with graph.inserting_before(attend):
        fused = graph.call_function(
            torch.ops.spyre_mm.rope_store_attend,
            (
                *(query, keys, values, key_cache, value_cache, position_ids, table),
                *(slot_mapping, kv_blocks, kv_lengths, query_lengths, scale),
            ),
        )
    fused.meta = dict(attend.meta)
    attend.replace_all_uses_with(fused)
    for node in (attend, store):
        graph.erase_node(node)


def _define_op() -> None:
    define_operator(
        "rope_store_attend(Tensor query, Tensor keys, Tensor values, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor? position_ids, Tensor table, Tensor slot_mapping, "
        "Tensor kv_blocks, Tensor kv_lengths, Tensor query_lengths, float scale) -> Tensor",
        CPU=rope_store_attend,
        Meta=shape_of_first,
    )


def rope_store_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position_ids: torch.Tensor | None,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_blocks: torch.Tensor,
    kv_lengths: torch.Tensor,
    query_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """``rope``, ``paged_store`` and ``paged_attention`` in one operator."""
    kv = PagedKV(key_cache, value_cache, kv_blocks, kv_lengths)
    angles = RopeAngles(position_ids, table)
    if int(query_lengths[0]) <= 1 and paged_decode.supports(query.shape[-1], query.dtype):
        new = NewKV(keys, values, slot_mapping)
        return paged_decode.rope_store_decode(query, new, angles, kv, scale)
    query, keys = rope.rotate(query, keys, *angles)
    attention.paged_store(keys, values, key_cache, value_cache, slot_mapping)
    return attention.attend_paged(query, kv, query_lengths, scale, compiled=True)
