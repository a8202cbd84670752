# SPDX-License-Identifier: Apache-2.0
"""An EC connector without a place to keep anything, and steps with requests that it serves."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ECTransferConfig
from vllm.distributed.ec_transfer import ec_transfer_state
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.output import SchedulerOutput

from tests.worker.test_requests import state_of
from vllm_spyre_mm.multimodal.encoder_cache import EncoderCache
from vllm_spyre_mm.worker.ec_transfer import FeatureTransfer
from vllm_spyre_mm.worker.encoding import ImageEncoder, ImageEncodingError
from vllm_spyre_mm.worker.ranks import Ranks

WIDTH = 4


class Metadata(ECConnectorMetadata):
    """What the stub is told in a step.

    Args:
        brings: features by identifier.
        finishes: what it says it has sent.
    """

    def __init__(self, brings: dict[str, Any] | None = None, finishes: str = "") -> None:
        self.brings, self.finishes = brings or {}, finishes


class StubConnector(ECConnectorBase):
    """Brings what its metadata hold, and notes what it is given.

    Attributes:
        saved: identifiers, in order.
        fault: ``start`` or ``save``, where it raises.
    """

    def __init__(self, transfer: ECTransferConfig) -> None:
        config: Any = SimpleNamespace(ec_transfer_config=transfer)
        super().__init__(config, ECConnectorRole.WORKER)
        self.saved: list[str] = []
        self.fault: str | None = None

    def start_save_caches(self, **kwargs: Any) -> None:
        if self.fault == "start":
            raise ConnectionError("nobody is there")

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        encoder_cache |= self._metadata.brings

    def save_caches(
        self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any
    ) -> None:
        if self.fault == "save":
            raise OSError(28, "No space left on device")
        self.saved.append(mm_hash)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        said = {self._metadata.finishes} if self._metadata.finishes else set()
        return said | finished_req_ids, None

    @property
    def _metadata(self) -> Metadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Metadata)
        return metadata

    def has_cache_item(self, identifier: str) -> bool:
        raise AssertionError("the scheduler's side")

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        raise AssertionError("the scheduler's side")

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Metadata:
        raise AssertionError("the scheduler's side")


class Transfer:
    """The transfer of a worker of one of the ranks, and steps that it takes part in.

    Attributes:
        connector: which the first rank alone has.
        encoded: what the steps were to encode, by step.
    """

    def __init__(self, ranks: Ranks, role: Any = "ec_both", *, has_encoder: bool = True) -> None:
        config = ECTransferConfig(ec_connector="Stub", ec_role=role)
        self.connector = StubConnector(config)
        model: Any = SimpleNamespace(
            mapping=SimpleNamespace(feature_width=WIDTH),
            part=SimpleNamespace(has_encoder=has_encoder),
        )
        encoder = ImageEncoder(model, ranks, torch.bfloat16, torch.bfloat16)
        self.ranks, self.encoded = ranks, list[list[int]]()
        self.transfer = FeatureTransfer(
            EncoderCache(), encoder, ranks, config=config, merges=role != "ec_producer"
        )

    @property
    def cache(self) -> dict[str, list[list[float]]]:
        """The worker's features."""
        return {name: rows.tolist() for name, rows in self.transfer.cache.tensors.items()}

    def step(
        self,
        metadata: ECConnectorMetadata | None,
        *features: MultiModalFeatureSpec,
        asked: tuple[int, ...] = (),
        finished: tuple[str, ...] = (),
    ) -> str | None:
        """The first step of a request; what is to be encoded becomes ones.

        Args:
            metadata: the connector's.
            features: of the request, which reads them all in this step.
            asked: indices of those that the scheduler asks for.
            finished: ids of other requests.

        Returns:
            Why it fails, or None.
        """
        length = sum(each.mm_position.length for each in features)
        output = SchedulerOutput.make_empty()
        output.ec_connector_metadata, output.finished_req_ids = metadata, set(finished)
        output.num_scheduled_tokens = {"a": length}
        output.scheduled_encoder_inputs = {"a": list(asked)} if asked else {}
        request = state_of(mm_features=list(features), prompt_token_ids=[1] * length)
        requests: Any = {"a": request}
        try:
            with (
                connected(self.connector if self.ranks.is_first else None),
                self.transfer.step(output),
            ):
                items = self.transfer.to_encode(output, requests).get("a", [])
                self.encoded.append(items)
                for item in items:
                    rows = torch.ones(features[item].mm_position.length, WIDTH)
                    self.transfer.cache.put(features[item], rows.bfloat16())
        except ImageEncodingError as error:
            return str(error)
        return None


@contextmanager
def connected(connector: ECConnectorBase | None) -> Iterator[None]:
    """The connector is that of this process for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ec_transfer_state, "_EC_CONNECTOR_AGENT", connector)
        yield
