# SPDX-License-Identifier: Apache-2.0
"""Features that one engine encodes and another reads, in processes of their own, over a folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, RequestOutput
from vllm.config import ECTransferConfig

from tests import architectures, qwen_vl
from tests.checkpoints import edit_tensors, llava_next_config
from tests.e2e.engines import engine, greedy, relative_error
from tests.e2e.server_embeddings.requests import drawn, expected_features, parts_of, post
from tests.e2e.serving import running_server
from tests.e2e.test_qwen_vl import QwenAsk
from tests.e2e.video_asks import VideoAsk
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference
from tests.videos import video
from vllm_spyre_mm.payload import decode_mm_embedding

MAX_TOKENS = 12
CONFIGS = {"llava_next": llava_next_config(), "qwen3_vl": qwen_vl.qwen3_vl()}
LIMITS = {"llava_next": {"image": 4}, "qwen3_vl": {"image": 4, "video": 1}}
FILE = "encoder_cache.safetensors"


class LlavaAsk(VideoAsk):
    image_tag, video_tag = "<image>\n", ""
    template = "<|user|>\n{items}{question}\n<|assistant|>\n"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.save_checkpoint(tmp_path_factory.mktemp(model), CONFIGS[model])


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def asks(model: str) -> dict[str, VideoAsk]:
    videos = model == "qwen3_vl"
    ask = QwenAsk if videos else LlavaAsk
    asks: dict[str, VideoAsk] = {
        "one": ask("What is it?", (picture(120, 60),)),
        "two": ask("And these?", (picture(120, 60), picture(40, 100))),
        "damaged": ask("Say what you see.", (picture(64, 48),)),
    }
    if videos:
        asks["video"] = ask("And then?", (picture(120, 60),), (video(6, 80, 64),))
    return asks


def transfer(role: Any, folder: Path) -> ECTransferConfig:
    """What moves features through files in a folder."""
    return ECTransferConfig(
        ec_connector="ECExampleConnector",
        ec_role=role,
        ec_connector_extra_config={"shared_storage_path": str(folder)},
    )


def generate(llm: LLM, ask: VideoAsk) -> RequestOutput:
    (output,) = llm.generate(ask.prompt, greedy(MAX_TOKENS))
    return output


def embedding(output: RequestOutput) -> torch.Tensor:
    found = output.outputs[0].mm_embedding
    assert found is not None
    return found


def encoder_runs(llm: LLM) -> int:
    (found,) = (each for each in llm.get_metrics() if each.name == "vllm:spyre_encoder_runs")
    return found.value


@pytest.fixture(scope="module")
def produced(
    model: str, checkpoint: Path, folder: Path, asks: dict[str, VideoAsk]
) -> Iterator[dict[str, RequestOutput]]:
    """What a producer answers; its process has ended, and its features are in the folder."""
    with engine(
        checkpoint,
        own_process=True,
        ec_transfer_config=transfer("ec_producer", folder),
        limit_mm_per_prompt=LIMITS[model],
        max_num_batched_tokens=128,
        disable_log_stats=False,
    ) as llm:
        outputs = {name: generate(llm, ask) for name, ask in asks.items()}
        assert encoder_runs(llm) == len(asks)
    return outputs


def test_a_producer_answers_once_its_images_are_encoded(
    produced: dict[str, RequestOutput],
    asks: dict[str, VideoAsk],
    reference: Reference,
    folder: Path,
) -> None:
    assert len(list(folder.rglob(FILE))) == len(asks)
    for name, ask in asks.items():
        output = produced[name]
        assert output.outputs[0].finish_reason == "stop"
        assert not output.outputs[0].token_ids
        expected = ask.features(reference)
        assert expected is not None
        assert relative_error(embedding(output), expected) < 1e-4
        assert output.ec_transfer_params is not None
        assert len(output.ec_transfer_params) == len(ask.images) + len(ask.videos)


def test_a_consumer_answers_with_the_features_of_another(
    produced: dict[str, RequestOutput],
    model: str,
    checkpoint: Path,
    asks: dict[str, VideoAsk],
    reference: Reference,
    folder: Path,
) -> None:
    """Prompts are cut into chunks inside of pictures; what is damaged is encoded anew, or refused
    by an engine that has no encoder."""
    refuses = model == "qwen3_vl"
    (identifier,) = produced["damaged"].ec_transfer_params or {}
    damaged = next(folder.rglob(f"{identifier}*/{FILE}"))
    os.truncate(damaged, damaged.stat().st_size // 2)
    with engine(
        checkpoint,
        own_process=True,
        ec_transfer_config=transfer("ec_consumer", folder),
        limit_mm_per_prompt=LIMITS[model],
        max_num_batched_tokens=128,
        disable_log_stats=False,
        additional_config={"missing_features": "refuse" if refuses else "encode"},
    ) as llm:
        for name in asks:
            runs = int(name == "damaged")
            output, ask = generate(llm, asks[name]), asks[name]
            if refuses and runs:
                assert output.outputs[0].finish_reason == "error"
                assert "this engine encodes none" in str(output.outputs[0].stop_reason)
                continue
            assert encoder_runs(llm) == runs
            assert list(output.outputs[0].token_ids) == ask.expected(reference, MAX_TOKENS)
            assert relative_error(embedding(output), embedding(produced[name])) < 1e-6


# -- an encoder alone -----------------------------------------------------------------------------


def test_an_encoder_alone_serves_embeddings_without_any_weight_of_the_decoder(
    demo_checkpoint: Path, demo_reference: Reference, tmp_path: Path
) -> None:
    """There is none in the checkpoint that it is started with."""
    checkpoint = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    stored = load_file(checkpoint / "model.safetensors")
    decoder = [name for name in stored if name.startswith("language_model.")]
    assert len(decoder) > 20
    edit_tensors(checkpoint, dict.fromkeys(decoder))
    image = drawn(1)
    with running_server(checkpoint, tmp_path / "log.txt", "--mm-encoder-only") as server:
        status, body = post(server, {"input": parts_of(image)})
        assert status == 200
        found = decode_mm_embedding(body["mm_embedding"])
        assert relative_error(found, expected_features(demo_reference, image)) < 1e-4
        text = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
        status, body = post(server, text, "/v1/chat/completions")
        assert status == 400
        assert "runs the vision encoder alone" in json.dumps(body)
