# SPDX-License-Identifier: Apache-2.0
"""An EC connector that fails where a test wants it to."""

from typing import Any

from vllm_spyre_mm.scheduler.folder_connector import FolderConnector


class FaultyConnector(FolderConnector):
    """A folder whose worker's side may raise.

    Attributes:
        fault: ``load`` or ``save``, None for none.
    """

    fault: str | None = None

    def start_load_caches(self, *args: Any, **kwargs: Any) -> None:
        if self.fault == "load":
            raise ConnectionError("the peer is gone")
        super().start_load_caches(*args, **kwargs)

    def save_caches(self, *args: Any, **kwargs: Any) -> None:
        if self.fault == "save":
            raise ConnectionError("the peer takes nothing")
        super().save_caches(*args, **kwargs)
