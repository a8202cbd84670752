# SPDX-License-Identifier: Apache-2.0
"""The encoder's real process: what it gives, and how it ends."""

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_spyre_mm.config import CardSettings
from vllm_spyre_mm.model_executor.backends import make_backend
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.model_executor.pieces import whole
from vllm_spyre_mm.multimodal.mm_mappings import get_mm_mapping
from vllm_spyre_mm.worker.encoder_process import parent
from vllm_spyre_mm.worker.encoder_process.channel import Channel, channel_pair
from vllm_spyre_mm.worker.encoder_process.child import serve
from vllm_spyre_mm.worker.encoder_process.messages import EncoderJob
from vllm_spyre_mm.worker.encoder_process.parent import EncoderProcess, ProcessFault
from vllm_spyre_mm.worker.encoder_process.queue import ProcessEncodeQueue
from vllm_spyre_mm.worker.encoding import encode_pieces
from vllm_spyre_mm.worker.step_sizes import step_sizes

BOUND_SECONDS = 120.0


@dataclass(frozen=True)
class Model:
    """What a process is for, and how pictures are made for it."""

    job: EncoderJob
    picture: Callable[[str, tuple[int, int]], MultiModalFeatureSpec]


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Model:
    config = EngineArgs(model=str(demo_checkpoint), max_model_len=1024).create_engine_config()
    mapping = get_mm_mapping(config.model_config.hf_config)
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)

    def picture(color: str, size: tuple[int, int]) -> MultiModalFeatureSpec:
        shown = {"image": [Image.new("RGB", size, color)]}
        items = processor.info.parse_mm_data(shown, validate=False)
        processed = processor([mapping.image_token_id], items)
        return MultiModalFeatureSpec(
            data=processed["mm_kwargs"]["image"][0],
            modality="image",
            identifier=f"{color} {size}",
            mm_position=processed["mm_placeholders"]["image"][0],
        )

    job = EncoderJob(
        mapping=mapping,
        checkpoint=demo_checkpoint,
        seed=0,
        encoder_dtype=torch.float32,
        decoder_dtype=torch.float16,
        sizes=step_sizes(config),
        warmup=[picture("black", size) for size in mapping.warmup_image_sizes()],
    )
    return Model(job, picture)


@pytest.fixture(scope="module")
def queue(model: Model) -> Iterator[ProcessEncodeQueue]:
    queue = ProcessEncodeQueue(1 << 20, BOUND_SECONDS)
    queue.start(lambda: EncoderProcess(model.job, 1))
    yield queue
    queue.close()


def encode(
    queue: ProcessEncodeQueue, *pictures: MultiModalFeatureSpec, behind: int = 0
) -> dict[str, Any]:
    """Features of each picture, or why there are none; also of those asked for before."""
    queue.submit(pictures)
    deadline, found = time.monotonic() + BOUND_SECONDS, {}
    while len(found) < behind + len(pictures):
        assert time.monotonic() < deadline
        found |= {each.identifier: each for each in queue.advance(idle=True)}
    return {name: each.fault or each.features for name, each in found.items()}


def test_features_are_those_of_the_model(queue: ProcessEncodeQueue, model: Model) -> None:
    """Of several pictures together, in memory that the process shares."""
    pictures = [model.picture("red", (100, 80)), model.picture("blue", (300, 90))]
    found = encode(queue, *pictures)
    job = model.job
    assert job.checkpoint is not None
    options = LoadOptions(torch.float32, torch.float32)
    fms_model = load_model(job.mapping, job.checkpoint, options)
    whole_model = SpyreModel(
        fms_model, job.mapping, make_backend("eager", job.sizes, CardSettings())
    )
    with torch.no_grad():
        for picture in pictures:
            (expected,) = whole(encode_pieces(whole_model, [picture], torch.float32))
            torch.testing.assert_close(found[picture.identifier], expected, atol=1e-4, rtol=1e-4)


def test_a_picture_that_cannot_be_encoded_fails_alone(
    queue: ProcessEncodeQueue, model: Model
) -> None:
    good, bad, nan = (model.picture(color, (90, 90)) for color in ("red", "green", "white"))
    assert bad.data is not None
    assert nan.data is not None
    bad.data["pixel_values"].data = torch.zeros(2, 3, 7, 7)
    nan.data["pixel_values"].data.fill_(torch.nan)
    pid = queue.pid
    found = encode(queue, good, bad, nan)
    assert found[good.identifier].shape == (good.mm_position.get_num_embeds(), 256)
    assert found[bad.identifier].startswith("could not be encoded: RuntimeError: ")
    assert found[nan.identifier].startswith("was encoded to features with NaN or infinity in ")
    assert queue.pid == pid


def test_it_can_be_told_from_others_and_has_nothing_with_a_name(
    queue: ProcessEncodeQueue,
) -> None:
    process = psutil.Process(queue.pid)
    assert "Encoder" in process.name()
    mapped = {Path(each.path) for each in process.memory_maps()}
    assert not [path for path in mapped if path.parent == Path("/dev/shm") and path.exists()]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_for_the_worker(
    queue: ProcessEncodeQueue, model: Model, told: signal.Signals
) -> None:
    """One that is sent to every process of a terminal or a service does not end it."""
    pid = queue.pid
    os.kill(pid, told)
    assert encode(queue, model.picture("red", (80, 80)))
    assert queue.pid == pid


def test_one_that_is_killed_is_replaced_and_its_picture_fails(
    queue: ProcessEncodeQueue, model: Model
) -> None:
    killed = psutil.Process(queue.pid)
    killed.suspend()
    lost, behind = (model.picture(color, (70, 80)) for color in ("red", "blue"))
    queue.submit([lost])
    assert queue.advance(idle=False) == []
    queue.submit([behind])
    killed.kill()
    found = encode(queue, model.picture("green", (70, 80)), behind=2)
    reason = "could not be encoded: the vision encoder's process was ended by SIGKILL, which "
    assert found.pop(lost.identifier).startswith(reason)
    assert all(isinstance(features, torch.Tensor) for features in found.values())
    assert behind.identifier in found
    assert queue.pid != killed.pid
    assert not killed.is_running()


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("refused", ["socket.socketpair", "subprocess.Popen", "os.memfd_create"])
def test_one_that_the_system_refuses_is_a_fault_and_leaves_nothing(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "no")

    before, children = open_descriptors(), psutil.Process().children()
    monkeypatch.setattr(refused, refuse)
    sentence = r"^could not be had or spoken to: \[Errno 11\] no$"
    with pytest.raises(ProcessFault, match=sentence):
        EncoderProcess(NO_JOB, 1)
    assert open_descriptors() <= before
    assert psutil.Process().children() == children


NO_JOB: Any = "the process waits for this to be a job"


def pretended(
    monkeypatch: pytest.MonkeyPatch, code: str, job: EncoderJob = NO_JOB
) -> EncoderProcess:
    """A process that runs other code, which has its end of the channel as a file descriptor."""
    start = subprocess.Popen

    def pretend(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        return start([sys.executable, "-c", code, command[-1]], **more)

    monkeypatch.setattr(subprocess, "Popen", pretend)
    return EncoderProcess(job, 1)


def test_one_that_cannot_load_the_encoder_says_why(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does is done in this process, at a copy of its end of the channel."""
    ends = channel_pair()
    copy = Channel(socket.socket(fileno=os.dup(ends[1].fileno())))
    monkeypatch.setattr(parent, "channel_pair", lambda: ends)
    job = dataclasses.replace(model.job, checkpoint=tmp_path)
    process = pretended(monkeypatch, "", job)
    serve(copy)
    with pytest.raises(ProcessFault, match=r"^could not load the encoder: CheckpointError: "):
        next(process.receive())
    copy.close()
    assert process.end() == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL, which the system sends when"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV$"),
        ("raise SystemExit(3)", "ended with status 3$"),
    ],
)
def test_an_end_is_told_as_it_was(monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    process = pretended(monkeypatch, code)
    process.wait(BOUND_SECONDS)
    with pytest.raises(ProcessFault, match=f"^{reason}"):
        next(process.receive())
    process.kill()


def test_one_whose_output_nobody_reads_any_more_ends_too() -> None:
    module = "vllm_spyre_mm.worker.encoder_process.__main__"
    code = f"import sys, {module} as main; print('unread'); sys.stdin.read(); main.leave()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(BOUND_SECONDS) == 0


STARTS_TWO = """
import sys
from vllm_spyre_mm.worker.encoder_process.parent import EncoderProcess

one, other = (EncoderProcess("it waits for this to be a job", 1) for _ in range(2))
print(one.pid, other.pid, one.end(), flush=True)
sys.stdin.read()
"""


def test_it_ends_with_the_process_that_started_it() -> None:
    """In order, and if that is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_TWO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        ended, left, status = map(int, starter.stdout.readline().split())
        assert status == 0
        assert not psutil.pid_exists(ended)
        started = psutil.Process(left)
        assert started.is_running()
        starter.kill()
        starter.wait(BOUND_SECONDS)
    psutil.wait_procs([started], timeout=BOUND_SECONDS)
    assert not started.is_running()
