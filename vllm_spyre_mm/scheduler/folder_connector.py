# SPDX-License-Identifier: Apache-2.0
"""An EC connector of vLLM's that keeps features in files of a folder, over restarts.

It is given to an engine by its module: ``"ec_connector": "FolderConnector",
"ec_connector_module_path": "vllm_spyre_mm.scheduler.folder_connector"``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.multimodal.feature_origin import origin_of
from vllm_spyre_mm.multimodal.feature_store import FeatureStore

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = get_logger(__name__)


class FolderSettings(BaseModel):
    """The connector's settings, its ``ec_connector_extra_config``.

    Attributes:
        folder: of the files.
        max_bytes: bound on all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    max_bytes: int = Field(default=10 << 30, gt=0)

    @classmethod
    def parse(cls, extra_config: dict[str, Any]) -> "FolderSettings":
        """Check what the user gave.

        Raises:
            ValueError: says what is wrong with it.
        """
        try:
            return cls.model_validate(extra_config)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise ValueError(
                f"ec_connector_extra_config of FolderConnector is invalid: {faults}. It takes "
                "folder and max_bytes"
            ) from None


@dataclass
class FolderMetadata(ECConnectorMetadata):
    """What the scheduler tells the worker in a step.

    Attributes:
        origin: of the engine's features.
        loads: pictures whose features the step reads from the folder.
    """

    origin: str
    loads: list[str]


class FolderConnector(ECConnectorBase):
    """Keeps features in a folder: a consumer reads there, a producer writes.

    Args:
        vllm_config: of the engine.
        role: scheduler or worker.
    """

    def __init__(self, vllm_config: "VllmConfig", role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        transfer = vllm_config.ec_transfer_config
        assert transfer is not None, "vLLM has looked at it"
        self._settings = FolderSettings.parse(transfer.ec_connector_extra_config)
        self._loads: dict[str, None] = {}
        self._store: FeatureStore | None = None
        if role is ECConnectorRole.SCHEDULER:
            settings = SpyreSettings.from_vllm_config(vllm_config)
            self._open(origin_of(vllm_config, settings.encoder_dtype))

    def _open(self, origin: str) -> FeatureStore:
        """The store of features of an origin, which is the same for an engine's life."""
        if self._store is None:
            self._store = FeatureStore(self._settings.folder, origin, self._settings.max_bytes)
        return self._store

    @property
    def store(self) -> FeatureStore:
        """The store; the worker's is opened in the first step, which says the origin."""
        if self._store is not None:
            return self._store
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FolderMetadata)
        return self._open(metadata.origin)

    # -- scheduler --------------------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the folder has whole features of a picture."""
        return self.store.holds(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        """Have the worker read a picture, if it is there."""
        identifier = request.mm_features[index].identifier
        if self.is_consumer and self.has_cache_item(identifier):
            self._loads[identifier] = None

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> FolderMetadata:
        """What the worker reads in this step."""
        loads, self._loads = list(self._loads), {}
        return FolderMetadata(self.store.origin, loads)

    # -- worker -----------------------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Read the pictures of this step; one that has gone since is left out."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FolderMetadata)
        for identifier in metadata.loads:
            if identifier in encoder_cache:
                continue
            rows = self.store.read(identifier)
            if rows is not None:
                encoder_cache[identifier] = rows

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Keep a picture's features; a folder that cannot be written costs no answer.

        Raises:
            OSError: it cannot be written, and this engine only produces features for others.
        """
        try:
            self.store.write(mm_hash, encoder_cache[mm_hash])
        except OSError as error:
            if not self.is_consumer:
                raise
            logger.warning("features are not kept for a restart: %s", error)
