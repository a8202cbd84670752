# SPDX-License-Identifier: Apache-2.0
"""One compiled graph for the blocks of a decoder or a tower, called without Dynamo in between.

A function of ``torch.compile`` evaluates its guards at every call: for a block, some thirty on its
modules and numbers, which never change, take as long as the block's own Python. Here they are
evaluated once for each block, at its first call; afterwards only the number of tokens varies.
Inductor's code checks the shapes and strides of its inputs; a graph that runs without Inductor
(:mod:`eager_graph`) needs no such checks.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch._guards import TracingContext, tracing

from vllm_spyre_mm.model_executor.cpu.attention_fusion import fuse_attention
from vllm_spyre_mm.model_executor.cpu.eager_graph import eager_forward
from vllm_spyre_mm.model_executor.cpu.linear_fusion import fuse_linears
from vllm_spyre_mm.model_executor.cpu.tier import compiler_settings


class SharedGraphError(RuntimeError):
    """A block is not like the one whose graph it should share; the message says where."""


def share_graph(blocks: nn.ModuleList, mark_dynamic: Callable[[dict[str, Any]], None]) -> None:
    """Let blocks share one graph, in place; the first call of any of them compiles it.

    Args:
        blocks: of one class, called with keyword arguments; empty for a text model's tower.
        mark_dynamic: marks the dimensions that vary, in the arguments of the first call.
    """
    if not len(blocks):
        return
    graph = SharedGraph(type(blocks[0]).forward, mark_dynamic)
    for block in blocks:
        block.forward = partial(graph.first_call, block)


class SharedGraph:
    """The graph that is compiled for one block and shared by all that are equal to it.

    Args:
        forward: of the blocks' class.
        mark_dynamic: marks the dimensions that vary.
    """

    def __init__(
        self, forward: Callable[..., Any], mark_dynamic: Callable[[dict[str, Any]], None]
    ) -> None:
        self._forward = forward
        self._mark_dynamic = mark_dynamic
        self._compiled: tuple[Callable[..., Any], Any] | None = None

    def first_call(self, block: nn.Module, **inputs: Any) -> Any:
        """Compile the graph, or check that it fits this block; then run it.

        Raises:
            SharedGraphError: the block differs from the one that was compiled.
        """
        if self._compiled is None:
            self._mark_dynamic(inputs)
            # Otherwise each call would record itself for a profiler, even without one.
            with dynamo_config.patch(record_runtime_overhead=False):
                self._compiled = _compile(self._forward, block, inputs)
        run, guards = self._compiled
        arguments = inspect.signature(self._forward).bind(block, **inputs)
        arguments.apply_defaults()
        if not guards.check(arguments.arguments):
            failed = guards.check_verbose(arguments.arguments).verbose_code_parts
            raise SharedGraphError(
                "a layer differs from the first, whose compiled code it was to run; serve "
                f"this model with --enforce-eager ({'; '.join(failed)})"
            )
        block.forward = partial(run, block)
        return run(block, **inputs)


def _compile(
    forward: Callable[..., Any], block: nn.Module, inputs: dict[str, Any]
) -> tuple[Callable[..., Any], Any]:
    """Compile ``forward``: a function with its signature, and the guards on its arguments."""
    from torch._inductor.compile_fx import compile_fx

    with get_metrics_context(), dynamo_timed("share_graph"), torch_function_mode_stack_state_mgr:
        captured = fullgraph_capture(forward, (block,), inputs)
        graph = captured.backend_input
        assert graph is not None, "a block computes something"
        context = TracingContext(graph.fake_mode)
        context.tensor_to_context = graph.tensor_to_context
        with tracing(context):
            fuse_attention(graph.graph_module)
            fuse_linears(graph.graph_module)
            compiled: Any = eager_forward(graph.graph_module)
            if compiled is None:
                with compiler_settings():
                    compiled = compile_fx(graph.graph_module, graph.example_inputs)
        guards = captured.graph_capture_output.build_guards(forward.__code__).guard_manager
    run = captured.forward_callable(compiled_fn=compiled, extra_globals=forward.__globals__)
    return run, guards
