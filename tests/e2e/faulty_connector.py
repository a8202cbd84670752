# SPDX-License-Identifier: Apache-2.0
"""An EC connector that fails where a test wants it to."""

from typing import Any

from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

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


class SetsFault:
    """Extends a worker: its connector, where it has one, can be told to fail."""

    def set_fault(self, fault: str | None) -> None:
        """Fail from now on in this part, or in none."""
        if has_ec_transfer():
            connector = get_ec_transfer()
            assert isinstance(connector, FaultyConnector)
            connector.fault = fault
