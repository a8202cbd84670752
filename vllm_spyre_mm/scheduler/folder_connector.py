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
from vllm.distributed.ec_transfer.ec_connector.utils import (
    PlaceholderMetadataResolver,
    collect_ec_item_metadata,
)

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.multimodal.feature_origin import origin_of
from vllm_spyre_mm.multimodal.feature_store import FeatureStore
from vllm_spyre_mm.multimodal.given_features import given_features

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
        keeps: pictures of the requests that the step admits, which the folder is to have.
    """

    origin: str
    loads: list[str]
    keeps: list[str]


class FolderConnector(ECConnectorBase):
    """Keeps features in a folder: each role reads there, and a producer writes.

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
        self._published = PlaceholderMetadataResolver(vllm_config.model_config)
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
        return self._open(self._metadata.origin)

    @property
    def _metadata(self) -> FolderMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FolderMetadata)
        return metadata

    # -- scheduler --------------------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the folder has whole features of a picture."""
        return self.store.holds(identifier)

    def update_state_after_alloc(self, request: "Request", index: int) -> None:
        """Have the worker read a picture, if it is there."""
        identifier = request.mm_features[index].identifier
        if self.has_cache_item(identifier):
            self._loads[identifier] = None

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> FolderMetadata:
        """What the worker reads in this step, and what it keeps."""
        loads, self._loads = list(self._loads), {}
        keeps: dict[str, None] = {}
        for new in scheduler_output.scheduled_new_reqs if self.is_producer else ():
            encoded = (each for each in new.mm_features if given_features(each) is None)
            keeps |= dict.fromkeys(each.identifier for each in encoded)
        return FolderMetadata(self.store.origin, loads, list(keeps))

    def request_finished(self, request: "Request") -> tuple[bool, dict[str, Any] | None]:
        """Name the pictures of a producer's request in its answer, as vLLM's connectors do."""
        if not self.is_producer:
            return False, None
        return False, collect_ec_item_metadata(request.mm_features, self._published) or None

    # -- worker -----------------------------------------------------------------------------------

    def start_save_caches(self, **kwargs: Any) -> None:
        """Keep what the worker still has and the folder has no more.

        A pure producer, which vLLM has load nothing, reads the pictures of this step here.

        Raises:
            OSError: as for :meth:`save_caches`.
        """
        encoder_cache: dict[str, torch.Tensor] = kwargs["encoder_cache"]
        for identifier in self._metadata.keeps:
            if identifier in encoder_cache and not self.store.holds(identifier):
                self.save_caches(encoder_cache, identifier)
        if not self.is_consumer:
            self.start_load_caches(encoder_cache)

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Read the pictures of this step; one that has gone since is left out."""
        for identifier in self._metadata.loads:
            if identifier in encoder_cache:
                continue
            rows = self.store.read(identifier)
            if rows is not None:
                encoder_cache[identifier] = rows

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        """Keep a picture's features; a folder that does not take them costs no answer.

        Raises:
            OSError: it does not take them, and this engine only produces features for others.
        """
        try:
            self.store.write(mm_hash, encoder_cache[mm_hash])
        except OSError as error:
            if not self.is_consumer:
                raise
            if self.store.is_news(error):
                logger.warning("features are not kept for a restart: %s", error)
