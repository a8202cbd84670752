# SPDX-License-Identifier: Apache-2.0
"""What fits together of an encoder and a decoder that are apart; commands of the page are taken."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ECTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests import architectures
from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.encoder_transfer import encodes_alone
from vllm_spyre_mm.model_executor.parts import ModelPart
from vllm_spyre_mm.worker.ec_transfer import loaded_part

PAGE = Path(__file__).parents[2] / "docs" / "encoder-transfer.md"
COMMANDS = re.findall(r"^vllm serve PATH (.*)$", PAGE.read_text(), re.M)


def transfer(role: Any, connector: str = "ECExampleConnector") -> ECTransferConfig:
    return ECTransferConfig(ec_connector=connector, ec_role=role)


def configure(checkpoint: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=str(checkpoint), **arguments).create_engine_config()


def part_of(config: VllmConfig) -> ModelPart:
    return loaded_part(config, SpyreSettings.from_vllm_config(config))


@pytest.mark.parametrize(
    ("arguments", "ahead"),
    [
        ({}, True),
        ({"mm_processor_cache_type": "shm"}, False),
        ({"mm_encoder_only": True}, False),
        ({"ec_transfer_config": transfer("ec_both")}, False),
    ],
    ids=["usually", "pixels in shared memory", "an encoder alone", "a connector"],
)
def test_where_images_are_encoded_ahead(
    llava_next_checkpoint: Path, arguments: dict[str, Any], ahead: bool
) -> None:
    config = configure(llava_next_checkpoint, **arguments)
    assert SpyreSettings.from_vllm_config(config).encode_ahead == ahead


REFUSE = {"missing_features": "refuse"}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({}, ModelPart.WHOLE),
        ({"mm_encoder_only": True}, ModelPart.ENCODER),
        ({"ec_transfer_config": transfer("ec_producer")}, ModelPart.ENCODER),
        ({"ec_transfer_config": transfer("ec_consumer")}, ModelPart.WHOLE),
        ({"ec_transfer_config": transfer("ec_both")}, ModelPart.WHOLE),
        (
            {"ec_transfer_config": transfer("ec_consumer"), "additional_config": REFUSE},
            ModelPart.DECODER,
        ),
    ],
    ids=["whole", "alone", "producer", "consumer", "both", "refusing consumer"],
)
def test_what_an_engine_loads(
    llava_next_checkpoint: Path, arguments: dict[str, Any], part: ModelPart
) -> None:
    config = configure(llava_next_checkpoint, **arguments)
    assert part_of(config) is part
    assert encodes_alone(EngineArgs(model="", **arguments)) == (part is ModelPart.ENCODER)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"additional_config": REFUSE}, "missing_features='refuse' is for an engine with"),
    (
        {"additional_config": REFUSE, "ec_transfer_config": transfer("ec_both")},
        "missing_features='refuse' is for an engine with",
    ),
    (
        {
            "additional_config": REFUSE,
            "ec_transfer_config": transfer("ec_consumer"),
            "mm_encoder_only": True,
        },
        "and without --mm-encoder-only: any other encodes its images",
    ),
    ({"mm_encoder_only": True, "tensor_parallel_size": 2}, "is not divided among ranks"),
    (
        {"mm_encoder_only": True, "additional_config": {"backend": "sendnn"}},
        "this engine runs the vision encoder alone: leave the backend out",
    ),
    (
        {"ec_transfer_config": transfer("ec_both", "ECCPUConnector")},
        "ec_connector='ECCPUConnector', which wants vLLM's own model runners",
    ),
    (
        {"ec_transfer_config": transfer("ec_consumer", "ECMooncakeConnector")},
        "ec_connector='ECMooncakeConnector', which wants vLLM's own model runners",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_does_not_fit_is_refused(
    llava_next_checkpoint: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        configure(llava_next_checkpoint, **arguments)


def test_a_text_model_has_no_features_to_move(tmp_path: Path) -> None:
    checkpoint = architectures.save_checkpoint(tmp_path, architectures.llama())
    with pytest.raises(ValueError, match="moves features of images, and the model takes none"):
        configure(checkpoint, ec_transfer_config=transfer("ec_consumer"))


def test_a_consumer_may_have_a_model_whose_features_vllm_cannot_lay_out(tmp_path: Path) -> None:
    """vLLM lets every consumer take features as input, and configurations are made twice."""
    config = architectures.mistral3(architectures.ministral3())
    checkpoint = architectures.save_checkpoint(tmp_path, config)
    made = configure(checkpoint, ec_transfer_config=transfer("ec_consumer"))
    assert part_of(dataclasses.replace(made)) is ModelPart.WHOLE


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_commands_of_the_page_are_taken(llava_next_checkpoint: Path, flags: str) -> None:
    parser = FlexibleArgumentParser()
    parser.add_argument("--port")
    AsyncEngineArgs.add_cli_args(parser)
    given = parser.parse_args(["--model", str(llava_next_checkpoint), *shlex.split(flags)])
    config = AsyncEngineArgs.from_cli_args(given).create_engine_config()
    assert part_of(config) in (ModelPart.ENCODER, ModelPart.WHOLE)


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 3
