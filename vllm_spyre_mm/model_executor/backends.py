# SPDX-License-Identifier: Apache-2.0
"""Makes the backend that the settings name."""

from vllm_spyre_mm.config import BackendName, CardSettings
from vllm_spyre_mm.model_executor.backend import Backend, StepSizes


def make_backend(name: BackendName, sizes: StepSizes, card: CardSettings) -> Backend:
    """Make the backend of a resolved setting, importing only that one."""
    if name == "sendnn":
        from vllm_spyre_mm.model_executor.card.backend import CardBackend

        return CardBackend(sizes, card)
    from vllm_spyre_mm.model_executor.cpu.backend import CpuBackend

    return CpuBackend(sizes, compiled=name == "inductor")
