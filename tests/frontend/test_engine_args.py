# SPDX-License-Identifier: Apache-2.0
"""vLLM's arguments take the platform's keyword and flags, and get the platform's defaults."""

import dataclasses
import json
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_spyre_mm import config
from vllm_spyre_mm.frontend import engine_args
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError

KEYWORD = "enable_return_mm_embedding"
MODEL = "a-model"

both_classes = pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])


def from_command_line(cls: type, *arguments: str) -> Any:
    """Arguments parsed as ``vllm serve`` does it; its parser is the one that platforms extend."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return cls.from_cli_args(parser.parse_args(["--model", MODEL, *arguments]))


# -- the keyword -----------------------------------------------------------------------------------


@both_classes
@pytest.mark.parametrize("wanted", [True, False])
def test_the_keyword_becomes_a_setting(cls: type, wanted: bool):
    arguments = cls(model=MODEL, enable_return_mm_embedding=wanted)
    assert arguments.additional_config == {KEYWORD: wanted}
    assert arguments.model == MODEL


@both_classes
def test_without_the_keyword_nothing_is_set(cls: type):
    assert KEYWORD not in cls(model=MODEL).additional_config
    given = cls(model=MODEL, enable_return_mm_embedding=None).additional_config
    assert KEYWORD not in given, "None is vLLM's way to say nothing"


@both_classes
def test_the_keyword_joins_other_settings_and_leaves_the_users_dict_alone(cls: type):
    given = {"backend": "eager"}
    arguments = cls(model=MODEL, additional_config=given, enable_return_mm_embedding=True)
    assert arguments.additional_config == {"backend": "eager", KEYWORD: True}
    assert given == {"backend": "eager"}


@both_classes
@pytest.mark.parametrize("wanted", [True, False])
def test_saying_it_twice_is_no_contradiction(cls: type, wanted: bool):
    arguments = cls(
        model=MODEL, additional_config={KEYWORD: wanted}, enable_return_mm_embedding=wanted
    )
    assert arguments.additional_config == {KEYWORD: wanted}


@both_classes
@pytest.mark.parametrize("wanted", [True, False])
def test_a_contradiction_is_refused_with_both_values(cls: type, wanted: bool):
    with pytest.raises(ValueError, match="contradicts additional_config") as error:
        cls(model=MODEL, additional_config={KEYWORD: not wanted}, enable_return_mm_embedding=wanted)
    assert f"{KEYWORD}={wanted}" in str(error.value)
    assert f"'{KEYWORD}': {not wanted}" in str(error.value)


@both_classes
def test_other_keywords_are_still_unknown(cls: type):
    with pytest.raises(TypeError, match="enable_return_mm_embeddings"):
        cls(model=MODEL, enable_return_mm_embeddings=True)


# -- the command line ----------------------------------------------------------------------------


@both_classes
def test_the_flag_becomes_a_setting(cls: type):
    assert from_command_line(cls, "--enable-return-mm-embedding").additional_config[KEYWORD]
    assert KEYWORD not in from_command_line(cls).additional_config


@both_classes
def test_the_flag_joins_settings_given_as_json(cls: type):
    arguments = from_command_line(
        cls, "--enable-return-mm-embedding", "--additional-config", '{"backend": "eager"}'
    )
    assert type(arguments) is cls
    assert arguments.additional_config == {"backend": "eager", KEYWORD: True}


@both_classes
def test_the_flag_and_the_json_may_contradict(cls: type):
    with pytest.raises(ValueError, match="contradicts"):
        from_command_line(
            cls,
            "--enable-return-mm-embedding",
            "--additional-config",
            json.dumps({KEYWORD: False}),
        )


@pytest.mark.parametrize("device", ["spyre", "auto"])
def test_the_platforms_own_device_is_accepted(device: str):
    assert from_command_line(EngineArgs, "--device", device).model == MODEL


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_another_device_is_refused_with_a_sentence(device: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        from_command_line(EngineArgs, "--device", device)
    assert stopped.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"--device {device}: vllm-spyre-mm makes Spyre the platform" in message
    assert "runs on the CPU where there is no card" in message
    assert "VLLM_PLUGINS" in message


# -- defaults --------------------------------------------------------------------------------------


@both_classes
def test_chunks_and_batches_have_the_platforms_sizes(cls: type):
    for arguments in (cls(model=MODEL), from_command_line(cls)):
        assert arguments.max_num_batched_tokens == 1536
        assert arguments.max_num_seqs == 16


@pytest.mark.parametrize(
    ("arguments", "chunk_size"),
    [({}, 512), ({"enforce_eager": True}, 1536)],
    ids=["decoder on the card", "decoder on the CPU"],
)
@both_classes
def test_beside_a_card_the_chunk_is_that_of_the_decoders_backend(
    cls: type, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, bool], chunk_size: int
):
    for module in (config, engine_args):
        monkeypatch.setattr(module, "card_backend_available", lambda: True)
    assert cls(model=MODEL, **arguments).max_num_batched_tokens == chunk_size


@both_classes
def test_sizes_that_the_user_gives_are_kept(cls: type):
    flags = ("--max-num-batched-tokens", "1024", "--max-num-seqs", "3")
    for arguments in (
        cls(model=MODEL, max_num_batched_tokens=1024, max_num_seqs=3),
        from_command_line(cls, *flags),
    ):
        assert arguments.max_num_batched_tokens == 1024
        assert arguments.max_num_seqs == 3


# -- installing ------------------------------------------------------------------------------------


def test_installing_again_wraps_nothing_twice():
    before = EngineArgs.__init__, AsyncEngineArgs.__init__
    engine_args.install_engine_args_hooks()
    assert (EngineArgs.__init__, AsyncEngineArgs.__init__) == before


@both_classes
@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_copy_says_what_the_original_says(cls: type, wanted: bool | None):
    arguments = cls(model=MODEL, enable_return_mm_embedding=wanted)
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    for copy in (dataclasses.replace(arguments, seed=3), cls(**fields)):
        assert copy.additional_config == arguments.additional_config


def test_arguments_that_are_not_as_expected_are_refused_by_name():
    class Module:
        __name__ = "vllm.engine.arg_utils"

        class EngineArgs:
            def __init__(
                self, additional_config: Any, dtype: Any, enforce_eager: Any, max_num_seqs: Any
            ) -> None:
                """A vLLM without chunks."""

        class AsyncEngineArgs:
            pass

    with pytest.raises(UnsupportedVllmError, match="no parameter 'max_num_batched_tokens'"):
        engine_args._extend_engine_args(Module)
    del Module.AsyncEngineArgs
    with pytest.raises(UnsupportedVllmError, match="no 'AsyncEngineArgs'"):
        engine_args._extend_engine_args(Module)


def test_a_keyword_of_vllms_own_is_not_swallowed():
    class Module:
        __name__ = "vllm.engine.arg_utils"

        class EngineArgs:
            def __init__(
                self,
                additional_config: Any,
                dtype: Any,
                enforce_eager: Any,
                max_num_batched_tokens: Any,
                max_num_seqs: Any,
                mm_encoder_only: Any,
                ec_transfer_config: Any,
                enable_return_mm_embedding: bool,
            ) -> None:
                """A vLLM that has it."""

        AsyncEngineArgs = EngineArgs

    with pytest.raises(UnsupportedVllmError, match=f"has a parameter {KEYWORD!r} of its own"):
        engine_args._extend_engine_args(Module)
