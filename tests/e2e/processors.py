# SPDX-License-Identifier: Apache-2.0
"""A logits processor for a test, importable by name in an engine."""

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor


class OnlyOneToken(LogitsProcessor):
    """Leaves token 123 alone possible."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        kept = logits[:, 123].clone()
        logits.fill_(-float("inf"))
        logits[:, 123] = kept
        return logits
