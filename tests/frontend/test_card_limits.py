# SPDX-License-Identifier: Apache-2.0
"""What a start on a card takes from known configurations, and says of limits beyond them."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tests.checkpoints import edit_config
from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend import card_limits

GRANITE_VISION = {"num_hidden_layers": 40, "hidden_size": 2048, "vocab_size": 49156}
GRANITE_8B = {"num_hidden_layers": 40, "hidden_size": 4096, "vocab_size": 49159}


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's compiler can be imported; nothing imports it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "e2e" / "stand_in"))


class Lines(logging.Handler):
    """Keeps what is logged, with its level."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged; a logger of its own, since vLLM sets its own up at the first start."""
    lines, logger = Lines(), logging.Logger("said")
    logger.addHandler(lines)
    monkeypatch.setattr(card_limits, "logger", logger)
    return lines.said


def configure(
    folder: Path, checkpoint: Path, decoder: dict[str, int], **arguments: Any
) -> VllmConfig:
    """The configuration of a start with the demo checkpoint, its decoder made another's."""
    model = folder / "model"
    if not model.exists():
        shutil.copytree(checkpoint, model)
        sizes = decoder | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
        sizes |= {"max_position_embeddings": 131072}
        edit_config(model, **{f"text_config__{name}": size for name, size in sizes.items()})
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def limits(config: VllmConfig) -> tuple[int, int, int | None, int | None]:
    """Length, sequences, bound and blocks."""
    return (
        config.model_config.max_model_len,
        config.scheduler_config.max_num_seqs,
        SpyreSettings.from_vllm_config(config).max_batch_tkv,
        config.cache_config.num_gpu_blocks_override,
    )


@pytest.mark.parametrize(
    ("decoder", "arguments", "expected"),
    [
        (GRANITE_VISION, {}, (8192, 16, 131072, 2064)),
        (GRANITE_VISION, {"tensor_parallel_size": 2}, (16384, 16, 131072, 2064)),
        (GRANITE_VISION, {"tensor_parallel_size": 4}, (32768, 32, 131072, 8192)),
        (GRANITE_8B, {}, (8192, 4, 32768, 516)),
        (GRANITE_8B, {"max_num_seqs": 16}, (3072, 16, 49152, 784)),
        (GRANITE_8B, {"max_model_len": 2048}, (2048, 16, 32768, 528)),
        (GRANITE_8B, {"max_model_len": -1}, (8192, 4, 32768, 516)),
    ],
    ids=str,
)
def test_a_known_model_starts_as_it_is_known_to_run(
    tmp_path: Path,
    demo_checkpoint: Path,
    said: list[str],
    decoder: dict[str, int],
    arguments: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    config = configure(tmp_path, demo_checkpoint, decoder, **arguments)
    assert limits(config) == expected
    (line,) = said
    assert line.startswith("INFO Granite")
    assert "is known to run on a card with --tensor-parallel-size" in line
    assert line.endswith(f"--max-model-len is {expected[0]} and --max-num-seqs {expected[1]}")


def test_what_the_user_gives_is_taken(
    tmp_path: Path, demo_checkpoint: Path, said: list[str]
) -> None:
    given = {"max_model_len": 1024, "max_num_seqs": 2}
    config = configure(tmp_path, demo_checkpoint, GRANITE_8B, **given)
    assert limits(config) == (1024, 2, 2048, 34)
    assert not said
    known = {"max_model_len": 3072, "max_num_seqs": 16}
    config = configure(tmp_path, demo_checkpoint, GRANITE_8B, **known)
    assert limits(config) == (3072, 16, 49152, 784)
    assert not said


def test_limits_beyond_a_known_configuration_are_warned_of_with_the_nearest(
    tmp_path: Path, demo_checkpoint: Path, said: list[str]
) -> None:
    given = {"max_model_len": 8192, "max_num_seqs": 16}
    config = configure(tmp_path, demo_checkpoint, GRANITE_8B, **given)
    assert limits(config) == (8192, 16, 131072, 2064)
    assert said == [
        "WARNING no card is known to run Granite 3.3 8B with --tensor-parallel-size 1 "
        "--max-model-len 8192 --max-num-seqs 16 and max_batch_tkv=131072; the nearest known "
        "configuration is --tensor-parallel-size 1 --max-model-len 3072 --max-num-seqs 16 and "
        "max_batch_tkv=49152"
    ]


def test_limits_of_a_model_that_is_not_known(
    tmp_path: Path, demo_checkpoint: Path, said: list[str]
) -> None:
    config = configure(tmp_path, demo_checkpoint, {"hidden_size": 256})
    assert limits(config) == (8192, 16, 131072, 2064)
    config = configure(tmp_path, demo_checkpoint, {}, max_num_seqs=32, max_model_len=32768)
    assert not said
    configure(tmp_path, demo_checkpoint, {}, max_num_seqs=33)
    (line,) = said
    assert line.startswith("WARNING no card is known to run more than --max-num-seqs 32, ")
    assert line.endswith("this start asks for 33, 8192 and 131072")
    configure(tmp_path, demo_checkpoint, {}, max_model_len=65536)
    assert "asks for 16, 65536 and 131072" in said[-1]
    configure(tmp_path, demo_checkpoint, {}, additional_config={"max_batch_tkv": 200_000})
    assert "asks for 16, 8192 and 200000" in said[-1]


def test_blocks_that_the_user_gives(tmp_path: Path, demo_checkpoint: Path) -> None:
    given = {"max_model_len": 256, "max_num_seqs": 3}
    config = configure(tmp_path, demo_checkpoint, {}, num_gpu_blocks_override=17, **given)
    assert config.cache_config.num_gpu_blocks_override == 15
    with pytest.raises(ValueError, match="--num-gpu-blocks-override 14 leaves 12 blocks"):
        configure(tmp_path, demo_checkpoint, {}, num_gpu_blocks_override=14, **given)
    # 4 layers, keys and values, 8 KV heads of 128, fp16.
    block_bytes = 4 * 2 * 8 * 128 * 2 * 64
    memory = 10 * block_bytes + 1
    config = configure(tmp_path, demo_checkpoint, {}, kv_cache_memory_bytes=memory, **given)
    assert config.cache_config.num_gpu_blocks_override == 9
    with pytest.raises(ValueError, match=r"--kv-cache-memory-bytes .* leaves 3 blocks"):
        configure(tmp_path, demo_checkpoint, {}, kv_cache_memory_bytes=5 * block_bytes, **given)


def test_a_copy_and_a_second_configuration_change_nothing(
    tmp_path: Path, demo_checkpoint: Path, said: list[str]
) -> None:
    config = configure(tmp_path, demo_checkpoint, GRANITE_8B)
    assert limits(dataclasses.replace(config)) == (8192, 4, 32768, 516)
    assert len(said) == 1
    # Fewer blocks than an override may give: what was asked for is looked at once.
    few = configure(tmp_path, demo_checkpoint, {}, kv_cache_memory_bytes=150 * 10_485_760)
    assert few.cache_config.num_gpu_blocks_override == 148
    assert dataclasses.replace(few).cache_config.num_gpu_blocks_override == 148
    arguments = EngineArgs(model=str(tmp_path / "model"))
    copy = dataclasses.replace(arguments, max_num_seqs=3)
    assert copy.create_engine_config().scheduler_config.max_num_seqs == 3


def test_the_cpu_takes_nothing_from_the_table(
    tmp_path: Path, demo_checkpoint: Path, said: list[str]
) -> None:
    config = configure(tmp_path, demo_checkpoint, GRANITE_8B, enforce_eager=True)
    assert limits(config) == (8192, 16, 131072, None)
    assert not said
