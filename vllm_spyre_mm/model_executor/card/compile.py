# SPDX-License-Identifier: Apache-2.0
"""Compilation for the card: the decoder as one graph for prefill and one for decode."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vllm_spyre_mm.model_executor.card.errors import cure_of


class CardError(RuntimeError):
    """The card's compiler or its runtime failed; the message names the step by its shapes."""


def compile_for_card(model: nn.Module) -> Callable[..., Any]:
    """Compile the decoder for the card as one graph; a failure raises :class:`CardError`.

    Importing ``torch_sendnn`` registers the backend; it reads ``VLLM_DT_*`` at that moment.
    """
    import torch_sendnn  # noqa: F401

    compiled = torch.compile(model, backend="sendnn", dynamic=False, fullgraph=True)

    def run(embeds: torch.Tensor, **inputs: Any) -> Any:
        try:
            return compiled(embeds, **inputs)
        except Exception as error:
            # PyTorch wraps what a backend raises, with a page about how to debug it.
            cause = getattr(error, "inner_exception", error)
            cure = cure_of(str(cause))
            advice = f"; what may help: {cure}" if cure else ""
            raise CardError(
                f"the card could not compile or run {_step_of(embeds, inputs)}: "
                f"{type(cause).__name__}: {cause}{advice}"
            ) from error

    return run


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
def warmup_context() -> Iterator[None]:
    """The card compiler's context in which graphs are compiled."""
    import torch_sendnn

    with torch_sendnn.warmup_mode():
        yield


def mark_for_card(
    tensor: torch.Tensor, *, dynamic: tuple[int, ...] = (), static: tuple[int, ...] = ()
) -> torch.Tensor:
    """Mark the dimensions that vary between calls as dynamic and those that never do as static."""
    for dim in dynamic:
        torch._dynamo.mark_dynamic(tensor, dim)
    for dim in static:
        torch._dynamo.mark_static(tensor, dim)
    return tensor
