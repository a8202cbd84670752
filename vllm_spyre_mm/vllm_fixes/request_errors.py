# SPDX-License-Identifier: Apache-2.0
"""Tells a client why its request failed.

Leans on: the OpenAI-compatible server answers a ``GenerationError`` with its text, in a stream too.
By itself vLLM answers every request that ends with ``finish_reason`` ``"error"`` with ``Internal
server error``; here the engine gives a reason with it, as ``stop_reason``. The front end calls this
where it sees every output that goes over HTTP (``frontend.async_llm``).
"""

from typing import TYPE_CHECKING

from vllm_spyre_mm.vllm_fixes.fault import Fault

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

FAULT = Fault(
    "vLLM answers every request that the engine ends with an error with 'Internal server error', "
    "whatever the reason.",
    seen_in="0.32.0",
)
REPLACED = ()


def raise_reason(output: "RequestOutput") -> None:
    """Raise the reason that an output of a request gives for its failure.

    Raises:
        GenerationError: with the reason.
    """
    from vllm.exceptions import GenerationError

    for completion in output.outputs:
        failed = completion.finish_reason == "error" and completion.stop_reason
        if failed and FAULT.applies():  # asked of few: every token comes by here
            raise GenerationError(f"the request failed: {completion.stop_reason}")
