# SPDX-License-Identifier: Apache-2.0
"""What the encoder's process does: it loads the encoder alone, and encodes what it is sent."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_spyre_mm.host_memory import return_free_memory
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.model_executor.cpu.backend import CpuBackend
from vllm_spyre_mm.model_executor.cpu.compile import cpu_compile_context
from vllm_spyre_mm.model_executor.cpu.memory import mmap_threshold
from vllm_spyre_mm.model_executor.dummy_weights import load_dummy_model
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.worker.encode_queue import EncodedImage
from vllm_spyre_mm.worker.encoder_process.channel import Channel
from vllm_spyre_mm.worker.encoder_process.messages import EncoderJob, Started
from vllm_spyre_mm.worker.piecewise_queue import PiecewiseEncodeQueue

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

logger = get_logger(__name__)


def serve(channel: Channel) -> None:
    """Load the encoder, say that it is ready, and encode batches until the channel is closed.

    Args:
        channel: gives an :class:`EncoderJob` and then lists of pictures; takes :class:`Started` and
            then an :class:`EncodedImage` for each picture of a list, in any order.
    """
    try:
        job: EncoderJob = channel.receive()
        fault, queue = None, None
        try:
            queue = load_encoder(job)
        except Exception as error:  # the worker says so, and ends or tries again
            logger.exception("The vision encoder could not be started")
            fault = f"{type(error).__name__}: {error}"
        channel.send(Started(fault))
        while queue is not None:
            for encoded in encode(queue, channel.receive()):
                channel.send(encoded)
    except (EOFError, ConnectionError):
        pass  # the worker has ended


def load_encoder(job: EncoderJob) -> PiecewiseEncodeQueue:
    """What encodes, with all graphs compiled.

    Raises:
        CheckpointError: the checkpoint does not hold exactly the encoder's tensors.
        RuntimeError: a picture of the warmup cannot be encoded.
    """
    options = LoadOptions(
        decoder_dtype=job.decoder_dtype, encoder_dtype=job.encoder_dtype, part=ModelPart.ENCODER
    )
    backend = CpuBackend(job.sizes, compiled=True)
    backend.prepare()
    with mmap_threshold():
        if job.checkpoint is None:
            fms_model = load_dummy_model(job.mapping, options, job.seed)
        else:
            fms_model = load_model(job.mapping, job.checkpoint, options)
        model = SpyreModel(fms_model, job.mapping, backend, ModelPart.ENCODER)
    model.compile()
    queue = PiecewiseEncodeQueue(model, job.encoder_dtype, job.decoder_dtype)
    with cpu_compile_context():
        for picture in job.warmup:
            for encoded in encode(queue, [picture]):
                if encoded.fault is not None:
                    raise RuntimeError(f"a picture of the warmup {encoded.fault}")
    return_free_memory()
    return queue


def encode(
    queue: PiecewiseEncodeQueue, pictures: "Sequence[MultiModalFeatureSpec]"
) -> Iterator[EncodedImage]:
    """What becomes of pictures that are encoded together, in any order."""
    queue.submit(pictures)
    left = len(pictures)
    while left:
        with torch.inference_mode():
            done = queue.advance(idle=True)
        left -= len(done)
        yield from done
