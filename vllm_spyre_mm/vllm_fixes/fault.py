# SPDX-License-Identifier: Apache-2.0
"""What a fix mends, and whether it is to be mended here."""

import importlib.metadata
from dataclasses import dataclass

from packaging.version import Version

from vllm_spyre_mm.environment import vllm_fixes_enabled


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of vLLM's.

    Attributes:
        sentence: what vLLM does by itself.
        seen_in: the release of vLLM in which it was seen last.
        mended_in: the first release without it; None while there is none.
    """

    sentence: str
    seen_in: str
    mended_in: str | None = None

    def applies(self) -> bool:
        """Whether the installed vLLM has the fault, and its fixes are not switched off."""
        return vllm_fixes_enabled() and not self._is_mended()

    def _is_mended(self) -> bool:
        if self.mended_in is None:
            return False
        return Version(importlib.metadata.version("vllm")) >= Version(self.mended_in)
