# SPDX-License-Identifier: Apache-2.0
"""Image features that come from elsewhere and go elsewhere, through an EC connector of vLLM's.

vLLM's scheduler asks the connector which images it has and does not schedule those to be encoded.
Here, in the worker, the connector loads them, what arrived is checked, and what was encoded is
given to it. An image that did not arrive after all is encoded, or its request fails.

The connector is that of the first rank, which shares with the others what arrived.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from vllm.distributed.ec_transfer import has_ec_transfer
from vllm.distributed.ec_transfer.ec_connector.utils import ECOutputAggregator
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.ec_connector_model_runner_mixin import ECConnectorModelRunnerMixin

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.multimodal.encoder_cache import EncoderCache
from vllm_spyre_mm.multimodal.feature_check import FeatureError, check_item
from vllm_spyre_mm.multimodal.given_features import given_features
from vllm_spyre_mm.multimodal.item_names import named
from vllm_spyre_mm.scheduler.outputs import SpyreModelRunnerOutput
from vllm_spyre_mm.scheduler.step import connector_steps
from vllm_spyre_mm.worker.encoding import ImageEncoder, ImageEncodingError
from vllm_spyre_mm.worker.ranks import Ranks
from vllm_spyre_mm.worker.requests import RequestTable, WorkerRequest

if TYPE_CHECKING:
    from vllm.config import ECTransferConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput

logger = get_logger(__name__)


def loaded_part(vllm_config: "VllmConfig", settings: SpyreSettings) -> ModelPart:
    """What an engine loads of its model."""
    if vllm_config.is_mm_encoder_only:
        return ModelPart.ENCODER
    refuses = settings.missing_features == "refuse"
    return ModelPart.DECODER if refuses else ModelPart.WHOLE


class FeatureTransfer(ECConnectorModelRunnerMixin):
    """Moves features between the worker's cache and the EC connector; idle without one.

    Args:
        cache: of the worker.
        encoder: of the worker; gives the form that features have.
        ranks: of the model.
        config: of the engine's EC connector, None without one.
        merges: whether the engine's decoder reads features.
    """

    def __init__(
        self,
        cache: EncoderCache,
        encoder: ImageEncoder,
        ranks: Ranks,
        *,
        config: "ECTransferConfig | None",
        merges: bool,
    ) -> None:
        self.cache, self.encoder, self.ranks = cache, encoder, ranks
        self.config, self.merges = config, merges
        self._unchecked: set[str] = set()
        self._encoded: list[MultiModalFeatureSpec] = []  # in the step that is under way
        self._reports: list[ECConnectorOutput] = []
        self._encoded_anew = 0

    @contextlib.contextmanager
    def step(self, scheduler_output: "SchedulerOutput") -> Iterator[None]:
        """The part of a step in which images are encoded: load before it, save after it.

        Raises:
            ImageEncodingError: on every rank, the connector did not take what was encoded.
        """
        self._encoded.clear()
        if self.config is None or scheduler_output.ec_connector_metadata is None:
            yield
            return
        *earlier, last = connector_steps(scheduler_output)
        for each in earlier:
            with contextlib.ExitStack() as stack:
                self._load(each, stack)
        with contextlib.ExitStack() as stack:
            self._load(last, stack)
            yield
            if self.config.is_ec_producer:
                self._save()

    def _load(self, scheduler_output: "SchedulerOutput", stack: contextlib.ExitStack) -> None:
        """Let the connector begin a step, which ends with the stack.

        Raises:
            ImageEncodingError: a producer's connector does not take what was encoded earlier.
        """
        if not has_ec_transfer():
            return
        before = set(self.cache.tensors)
        try:
            entered = self.maybe_get_ec_connector_output(scheduler_output, self.cache.tensors)
            self._reports += filter(None, [stack.enter_context(entered)])
        except Exception as error:  # a connector may raise anything
            assert self.config is not None, "there is a connector"
            if self.config.is_encode_only and scheduler_output.num_scheduled_tokens:
                _not_taken(error)
            # What is missing is seen next.
            logger.exception("The EC connector could not load the features of this step")
        loaded = set(self.cache.tensors)
        self._unchecked = (self._unchecked | (loaded - before)) & loaded

    def _save(self) -> None:
        """Give the connector what was encoded; what clients gave as features is theirs to keep."""
        made = [each.identifier for each in self._encoded if given_features(each) is None]
        if not made:
            return
        fault: ImageEncodingError | None = None
        if self.ranks.is_first:
            try:
                self._give(made)
            except ImageEncodingError as error:  # the other ranks wait for it
                fault = error
        fault = self.ranks.broadcast_object(fault)
        if fault is not None:
            self.cache.evict(each.identifier for each in self._encoded)
            raise fault

    def _give(self, identifiers: Iterable[str]) -> None:
        for identifier in dict.fromkeys(identifiers):
            try:
                self.maybe_save_ec_to_connector(self.cache.tensors, identifier)
            except Exception as error:
                _not_taken(error)

    def to_encode(
        self, scheduler_output: "SchedulerOutput", requests: RequestTable
    ) -> Mapping[str, list[int]]:
        """What a step has to encode, by request: indices of its items.

        That is what the scheduler asks for, and what the connector had for it and did not bring.

        Args:
            scheduler_output: of the step.
            requests: with those of the step.

        Raises:
            ImageEncodingError: something is to be encoded, and the engine has no encoder.
        """
        asked = scheduler_output.scheduled_encoder_inputs
        if self.config is None:
            return asked
        found: dict[str, list[int]] = {}
        for req_id, num_new in scheduler_output.num_scheduled_tokens.items():
            request, items = requests[req_id], asked.get(req_id, [])
            if request.prefilled:
                continue
            self._forget(request.mm_features[item].identifier for item in items)
            lacking = self.lacking(request, num_new, items)
            if lacking:
                self._share([request.mm_features[item] for item in lacking])
                lacking = self.lacking(request, num_new, items)
            wanted = {item: request.mm_features[item] for item in (*items, *lacking)}
            if wanted:
                self._check_encodable(wanted)
                found[req_id] = list(wanted)
                self._encoded += wanted.values()
                anew = [item for item in lacking if given_features(wanted[item]) is None]
                self._encoded_anew += len(anew)
        return found

    def _forget(self, identifiers: Iterable[str]) -> None:
        """Drop what the connector brought of images that are to be encoded: one rank has it."""
        for identifier in identifiers:
            self._unchecked.discard(identifier)
            self.cache.evict([identifier])

    def lacking(self, request: WorkerRequest, num_new: int, asked: Collection[int]) -> list[int]:
        """Items that a prefill reads, are not asked for, and are in no cache; each image once.

        Args:
            request: that is prefilled.
            num_new: tokens of the chunk.
            asked: items that the scheduler has asked to be encoded.
        """
        known = {request.mm_features[item].identifier for item in asked}
        lacking: dict[str, int] = {}
        for item in request.items_read(num_new, merges=self.merges):
            identifier = request.mm_features[item].identifier
            in_cache = identifier in self.cache and identifier not in self._unchecked
            if not in_cache and identifier not in known:
                lacking.setdefault(identifier, item)
        return list(lacking.values())

    def _share(self, features: "Sequence[MultiModalFeatureSpec]") -> None:
        """Check what the connector brought of some images, and give it to every rank."""
        arrived: list[int] = []
        for index, feature in enumerate(features):
            if feature.identifier in self._unchecked:
                self._unchecked.discard(feature.identifier)
                if self._check(feature):
                    arrived.append(index)
        shared = [features[index] for index in self.ranks.broadcast_object(arrived)]
        if self.ranks.is_first:
            self.ranks.send_tensors([self.cache.get(feature) for feature in shared])
            return
        for feature, rows in zip(shared, self.ranks.receive_tensors(), strict=True):
            self.cache.put(feature, rows)

    def _check(self, feature: "MultiModalFeatureSpec") -> bool:
        """Whether what arrived of an image are features of it; what are none leave the cache."""
        rows = self.cache.tensors.pop(feature.identifier)
        try:
            width = self.encoder.model.mapping.feature_width
            check_item(feature, rows, width, self.encoder.decoder_dtype)
        except FeatureError as error:
            logger.error("The EC connector brought %s for %s", error, feature.identifier)
            return False
        # Memory of their own: what a connector gives may be a file's, which others write to.
        self.cache.put(feature, rows.to(self.encoder.dtype, copy=True).contiguous())
        return True

    def _check_encodable(self, images: "Mapping[int, MultiModalFeatureSpec]") -> None:
        if self.encoder.model.part.has_encoder:
            return
        unknown = {i: each for i, each in images.items() if given_features(each) is None}
        if unknown:
            raise ImageEncodingError(
                f"the EC connector has no features of {named(unknown)}, and this engine encodes "
                "none (missing_features='refuse'): have an encoder encode them first"
            )

    def attach(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Put what the connector says of a step on the step's output."""
        reports, self._reports = self._reports, []
        count, self._encoded_anew = self._encoded_anew, 0
        if count:
            output = SpyreModelRunnerOutput.of(output)
            output.num_encoded_anew = count
        if not reports:
            return output
        outputs: list[ModelRunnerOutput | None] = [output]
        outputs += map(ModelRunnerOutput.with_ec_conn_output_only, reports)
        attached = ECOutputAggregator().aggregate(outputs)
        assert attached is not None, "there is an output to attach it to"
        return attached


def _not_taken(error: Exception) -> NoReturn:
    raise ImageEncodingError(
        "the images of the request were encoded, but the EC connector did not take them: "
        f"{type(error).__name__}: {error}"
    ) from error
