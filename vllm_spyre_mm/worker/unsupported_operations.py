# SPDX-License-Identifier: Apache-2.0
"""What operators may ask of a running engine and this platform's worker has no part in."""

from collections.abc import Callable
from typing import Any, NoReturn

from vllm.v1.worker.worker_base import WorkerBase

SLEEP = "sleep beyond level 0, which pauses the engine"
KV_CACHE_RELEASE = "an engine that gives the memory of its KV cache back"
WEIGHTS = "other weights in a running engine: start one with them"
SNAPSHOTS = "snapshots of a running engine"
LORA = "LoRA"

UNSUPPORTED = {
    "sleep": SLEEP,
    "discard": KV_CACHE_RELEASE,
    "compute_weight_checksums": "checksums of the weights",
    "profile": "vLLM's profiler",
    "add_lora": LORA,
    "remove_lora": LORA,
    "list_loras": LORA,
    "pin_lora": LORA,
    "init_weight_transfer_engine": WEIGHTS,
    "shutdown_weight_transfer_engine": WEIGHTS,
    "start_weight_update": WEIGHTS,
    "start_draft_weight_update": WEIGHTS,
    "update_weights": WEIGHTS,
    "finish_weight_update": WEIGHTS,
    "reset_weights": WEIGHTS,
    "reload_weights": WEIGHTS,
    "checkpoint_prepare": SNAPSHOTS,
    "checkpoint_restore": SNAPSHOTS,
}
"""Methods of vLLM's own workers, and what they are refused as."""


class RefusingWorker(WorkerBase):
    """A worker whose methods named in :data:`UNSUPPORTED` raise :class:`NotImplementedError`."""


def refuse(what: str) -> NoReturn:
    """Raise NotImplementedError, which a server answers with its text (HTTP 501)."""
    raise NotImplementedError(f"not supported on Spyre: {what}")


def _refusing(what: str) -> Callable[..., None]:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse(what)

    return method


for _name, _what in UNSUPPORTED.items():
    setattr(RefusingWorker, _name, _refusing(_what))
