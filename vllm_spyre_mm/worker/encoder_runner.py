# SPDX-License-Identifier: Apache-2.0
"""The model runner of an engine that runs the vision encoder alone (``--mm-encoder-only``)."""

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput, make_empty_encoder_model_runner_output

from vllm_spyre_mm.worker.model_runner import SpyreModelRunner


class EncoderRunner(SpyreModelRunner):
    """Encodes the images of prompts; there is no decoder, no KV cache and no token.

    vLLM's scheduler ends a request once its prompt has gone by.
    """

    def _compute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        output = make_empty_encoder_model_runner_output(scheduler_output)
        ((req_id, num_new),) = scheduler_output.num_scheduled_tokens.items()
        request = self.requests[req_id]  # the scheduler gives a prefill a step of its own
        end = request.num_computed_tokens + num_new
        self.collect(request, end)
        request.prefilled = end == request.num_tokens
        return self.end_prefill(request, output) if request.prefilled else output


class WidthProbe:
    """What vLLM measures the width of a producer's features on, before there is a runner.

    Args:
        width: elements of a feature.

    Attributes:
        supports_mm_inputs: vLLM asks a runner that does.
        device: of the encoder's inputs.
    """

    supports_mm_inputs = True
    device = torch.device("cpu")

    def __init__(self, width: int) -> None:
        self.width = width

    def get_model(self) -> "WidthProbe":
        """Itself: it has the one method that is called."""
        return self

    def embed_multimodal(self, **_: Any) -> list[torch.Tensor]:
        """Features of an item without any, ``(0, width)``: only their width is looked at."""
        return [torch.empty(0, self.width)]
