# SPDX-License-Identifier: Apache-2.0
"""What becomes of every flag of vLLM's: a table, and the check that a start makes with it.

A flag is *honoured*; or a value of it *stops the start* with a sentence, where the platform cannot
do what is asked; or it is *without effect*, where it only tunes a part of vLLM that does not run
here. A test compares the table with vLLM's configuration classes, so that a flag that a release of
vLLM adds is decided before that release is supported. Fields that an older one lacks are named in
``upstream.releases`` besides.
"""

from typing import TYPE_CHECKING

from vllm_spyre_mm.frontend.flags.decision import Decisions
from vllm_spyre_mm.frontend.flags.engine import (
    CACHE,
    EC_TRANSFER,
    ENGINE,
    LOAD,
    OBSERVABILITY,
    SCHEDULER,
    SCHEDULER_CLASS,
)
from vllm_spyre_mm.frontend.flags.model import MODEL, MULTIMODAL
from vllm_spyre_mm.frontend.flags.parallel import OTHER_FLAGS, PARALLEL, WORKER_CLASS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["OTHER_FLAGS", "SCHEDULER_CLASS", "TABLE", "WORKER_CLASS", "refuse_unsupported"]

TABLE: tuple[Decisions, ...] = (
    ENGINE,
    PARALLEL,
    MODEL,
    MULTIMODAL,
    SCHEDULER,
    CACHE,
    EC_TRANSFER,
    LOAD,
    OBSERVABILITY,
)


def refuse_unsupported(vllm_config: "VllmConfig") -> None:
    """Refuse what the platform cannot do.

    Raises:
        ValueError: names the first of it.
    """
    for decisions in TABLE:
        config = decisions.of(vllm_config)
        if config is None:
            continue
        for refused in decisions.refused:
            value = getattr(config, refused.field)
            if not refused.allowed(value, vllm_config):
                raise ValueError(f"not supported on Spyre: {refused.what.format(value=value)}")
