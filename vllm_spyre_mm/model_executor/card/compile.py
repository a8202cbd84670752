# SPDX-License-Identifier: Apache-2.0
"""Compilation for the card: the decoder as one graph for prefill and one for decode."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.card.errors import cure_of
from vllm_spyre_mm.model_executor.kv_cache import KVCache

logger = get_logger(__name__)

OPTIONS: dict[str, Any] = {"sendnn.dynamic": True}
"""Of the compiler: keep marked dimensions as symbols, so that one program serves every size."""


class CardError(RuntimeError):
    """The card's compiler or its runtime failed; the message names the step by its shapes."""


class DecoderStep(nn.Module):
    """What is compiled: the decoder for steps of one kind, with logits in fp32.

    The cast belongs to the graph. The device's 16-bit numbers are not IEEE's, and a graph that
    gives fp16 rounds the logits to those first.

    Args:
        decoder: the FMS model.
        last_n_tokens: positions from the end that get logits; a constant of the graph, as an
            integer that is a module's attribute is to Dynamo.
    """

    def __init__(self, decoder: nn.Module, last_n_tokens: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.last_n_tokens = last_n_tokens

    def forward(self, embeds: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, KVCache]:
        """Logits fp32 ``(batch, last_n_tokens, vocab_size)``, and the cache of the next step."""
        logits, kv_cache = self.decoder(embeds, last_n_tokens=self.last_n_tokens, **inputs)
        return logits.float(), kv_cache


class CardDecoder:
    """The decoder as graphs for the card's compiler; a failure says of which step.

    Importing ``torch_sendnn`` registers the compiler; it reads its environment at that moment.

    Args:
        model: the FMS model.
        fullgraph: whether a graph break is an error.
    """

    def __init__(self, model: nn.Module, *, fullgraph: bool) -> None:
        with keep_signal_handlers():
            import torch_sendnn  # noqa: F401
        self._model = model
        self._fullgraph = fullgraph
        self._steps: dict[int, Any] = {}
        self._traced: list[str] = []

    def __call__(self, embeds: torch.Tensor, *, last_n_tokens: int, **inputs: Any) -> Any:
        """Run a step.

        Raises:
            CardError: it cannot be compiled or run.
        """
        if last_n_tokens not in self._steps:
            self._steps[last_n_tokens] = torch.compile(
                DecoderStep(self._model, last_n_tokens),
                backend="sendnn",
                fullgraph=self._fullgraph,
                options=OPTIONS,
            )
            self._traced.append(_step_of(embeds, inputs))
        try:
            return self._steps[last_n_tokens](embeds, **inputs)
        except Exception as error:
            raise CardError(
                f"the card could not compile or run {_step_of(embeds, inputs)}: {_cause(error)}"
            ) from error

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The context in which graphs are traced; they are compiled when it is left.

        Sizes of 1 are kept as symbols, like any other.

        Raises:
            CardError: they cannot be compiled.
        """
        import torch_sendnn

        with keep_signal_handlers(), contextlib.ExitStack() as stack:
            stack.enter_context(torch_sendnn.warmup_mode())
            # The module gets its ``patch`` at run time.
            with symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
                yield
            try:
                stack.close()
            except Exception as error:
                steps = " and ".join(self._traced)
                raise CardError(
                    f"the card could not compile or run {steps}: {_cause(error)}"
                ) from error


def _cause(error: Exception) -> str:
    """What a backend raised, and what may help where its text is public.

    PyTorch wraps it, with a page about how to debug it.
    """
    cause = getattr(error, "inner_exception", error)
    cure = cure_of(str(cause))
    advice = f"; what may help: {cure}" if cure else ""
    return f"{type(cause).__name__}: {cause}{advice}"


def _step_of(embeds: torch.Tensor, inputs: Mapping[str, Any]) -> str:
    """A step in words, with the shapes of its inputs."""
    rows, length = embeds.shape[:2]
    step = f"a decode of {rows} rows" if length == 1 else f"a chunk of {length} tokens"
    shapes = {"embeds": embeds.shape}
    shapes |= {name: each.shape for name, each in inputs.items() if isinstance(each, torch.Tensor)}
    listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    caches = inputs["past_key_value_states"]
    return f"{step} ({listed}; {len(caches)} layers of KV cache {tuple(caches[0][0].shape)})"


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Put Python's handlers of SIGTERM and SIGINT back at the end.

    The card's runtime replaces them, in C, by its own, which print a backtrace and end the process
    before vLLM can. Python does not notice: what it knows to be installed is installed again.
    """
    known = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in known.items():
                if handler is not None:  # it was installed in C before, which cannot be undone
                    signal.signal(each, handler)
        else:
            logger.warning(
                "the card's runtime handles SIGTERM and SIGINT from now on: the engine was not "
                "made in the main thread, where alone Python can take them back"
            )


def card_input(
    tensor: torch.Tensor, *, dynamic: tuple[int, ...] = (), static: tuple[int, ...] = ()
) -> torch.Tensor:
    """A copy for the card's compiler: contiguous, no view, nothing of ``inference_mode``.

    Args:
        tensor: of the host.
        dynamic: dimensions that vary between calls.
        static: dimensions that never do.
    """
    copy = tensor.clone(memory_format=torch.contiguous_format)
    for dim in dynamic:
        torch._dynamo.mark_dynamic(copy, dim)
    for dim in static:
        torch._dynamo.mark_static(copy, dim)
    return copy
