# SPDX-License-Identifier: Apache-2.0
"""Settings are checked with sentences, resolved once, and the environment is set from them."""

import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from vllm_spyre_mm import config, register
from vllm_spyre_mm.config import SpyreSettings

WITH_BF16 = ("bfloat16", "float32")
WITHOUT_BF16 = ("float32",)


@pytest.fixture
def messages() -> Iterator[list[logging.LogRecord]]:
    """What the module logs; vLLM's loggers do not propagate to pytest's handler."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    config.logger.addHandler(handler)
    yield records
    config.logger.removeHandler(handler)


@pytest.fixture(params=[False, True], ids=["without card", "with card"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test runs as if ``torch_sendnn`` was absent, and as if it was there."""
    monkeypatch.setattr(config, "card_backend_available", lambda: request.param)
    return request.param


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "card_backend_available", lambda: False)


def resolve(settings: SpyreSettings | None = None, **changes: Any) -> SpyreSettings:
    arguments = {
        "enforce_eager": False,
        "decoder_dtype": "bfloat16",
        "host_dtypes": WITH_BF16,
        "max_model_len": 1000,
        "max_num_seqs": 4,
        **changes,
    }
    return (settings or SpyreSettings()).resolve(**arguments)


# -- what users give ------------------------------------------------------------------------------


def test_nothing_given_means_the_defaults():
    settings = SpyreSettings.parse({})
    assert settings == SpyreSettings()
    assert not settings.enable_return_mm_embedding
    assert (settings.backend, settings.encoder_dtype) == ("auto", "auto")


def test_every_setting_is_taken():
    given = {
        "enable_return_mm_embedding": True,
        "return_mm_embedding_by_default": False,
        "max_mm_embedding_response_bytes": 1000,
        "max_held_mm_embedding_bytes": 2000,
        "trust_client_image_uuids": True,
        "backend": "eager",
        "encoder_dtype": "float32",
        "encoder_cache_tokens": 5000,
        "max_batch_tkv": 4096,
    }
    assert SpyreSettings.parse(given).model_dump(exclude={"resolved"}) == given


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"enable_return_mm_embeding": True}, "enable_return_mm_embeding", "True"),
        ({"enable_return_mm_embedding": "true"}, "enable_return_mm_embedding", "'true'"),
        ({"enable_return_mm_embedding": 1}, "enable_return_mm_embedding", "1"),
        ({"max_batch_tkv": -1}, "max_batch_tkv", "-1"),
        ({"max_batch_tkv": 0}, "max_batch_tkv", "0"),
        ({"max_batch_tkv": "4096"}, "max_batch_tkv", "'4096'"),
        ({"encoder_cache_tokens": -5}, "encoder_cache_tokens", "-5"),
        ({"encoder_cache_tokens": 1.5}, "encoder_cache_tokens", "1.5"),
        ({"encoder_cache_tokens": True}, "encoder_cache_tokens", "True"),
        ({"backend": "cuda"}, "backend", "'cuda'"),
        ({"encoder_dtype": "float16"}, "encoder_dtype", "'float16'"),
    ],
)
def test_an_invalid_setting_is_refused_by_name_and_value(
    given: dict[str, Any], name: str, value: str
):
    with pytest.raises(ValueError, match="additional_config") as error:
        SpyreSettings.parse(given)
    assert f"{name}: " in str(error.value)
    assert f"(got {value})" in str(error.value)
    for setting in ("enable_return_mm_embedding", "backend", "max_batch_tkv"):
        assert setting in str(error.value).partition("The settings are: ")[2]


def test_every_fault_is_named_at_once():
    with pytest.raises(ValueError, match=r"backend: .*max_batch_tkv: ") as error:
        SpyreSettings.parse({"backend": 3, "max_batch_tkv": -1})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, [("backend", "eager")], "backend=eager", 3])
def test_anything_but_a_mapping_is_refused(given: object):
    with pytest.raises(ValueError, match="must be a JSON object") as error:
        SpyreSettings.parse(given)
    assert type(given).__name__ in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(SpyreSettings.model_fields)
SOME = st.sampled_from(["auto", "eager", "float32"]) | st.booleans() | st.integers(1, 10**9)


@over(JSON | st.dictionaries(st.sampled_from(NAMES) | st.text(), SOME | JSON))
def test_any_json_is_settings_or_refused(given: Any):
    try:
        settings = SpyreSettings.parse(given)
    except ValueError as error:
        refused = str(error)
        assert refused.startswith("additional_config ")
        return
    assert SpyreSettings.parse(settings.model_dump()) == settings
    assert SpyreSettings.parse(json.loads(settings.model_dump_json())) == settings
    assert {name: getattr(settings, name) for name in given} == given


@over(
    st.dictionaries(st.sampled_from(NAMES), SOME),
    st.booleans(),
    st.integers(1, 10**6),
    st.integers(1, 1000),
)
def test_what_is_resolved_holds_a_request_or_is_refused(
    given: Any, enforce_eager: bool, max_model_len: int, max_num_seqs: int
):
    try:
        settings = SpyreSettings.parse(given).resolve(
            enforce_eager=enforce_eager,
            decoder_dtype="float32",
            host_dtypes=("bfloat16", "float32"),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
    except ValueError:
        return
    assert settings.resolved
    assert settings.max_batch_tkv is not None
    assert settings.max_batch_tkv >= max_model_len
    assert settings.encoder_cache_tokens is not None
    assert settings.encoder_cache_tokens >= max_model_len
    assert "auto" not in settings.model_dump().values()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        SpyreSettings().backend = "eager"


# -- resolving ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enforce_eager", "without_card", "with_card"),
    [(False, "inductor", "sendnn"), (True, "eager", "eager")],
)
def test_the_backend_is_the_card_where_there_is_one(
    card: bool, enforce_eager: bool, without_card: str, with_card: str
):
    settings = resolve(enforce_eager=enforce_eager)
    assert settings.backend == (with_card if card else without_card)


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_cpu_backend_is_kept_even_beside_a_card(card: bool, backend: str):
    assert resolve(SpyreSettings(backend=backend)).backend == backend


@pytest.mark.usefixtures("no_card")
def test_the_card_without_its_compiler_is_refused():
    with pytest.raises(ValueError, match="torch_sendnn") as error:
        resolve(SpyreSettings(backend="sendnn"))
    assert "backend='auto'" in str(error.value)


def test_the_card_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config, "card_backend_available", lambda: True)
    assert resolve(SpyreSettings(backend="sendnn"), decoder_dtype="float16").backend == "sendnn"


@pytest.mark.parametrize("backend", ["sendnn", "inductor"])
def test_a_compiling_backend_and_enforce_eager_contradict(
    monkeypatch: pytest.MonkeyPatch, backend: str
):
    monkeypatch.setattr(config, "card_backend_available", lambda: True)
    with pytest.raises(ValueError, match="--enforce-eager") as error:
        resolve(SpyreSettings(backend=backend), enforce_eager=True)
    assert f"backend={backend!r}" in str(error.value)


@pytest.mark.parametrize(
    ("decoder_dtype", "host_dtypes", "expected"),
    [
        ("bfloat16", WITH_BF16, "bfloat16"),
        ("float32", WITH_BF16, "float32"),
        ("float32", WITHOUT_BF16, "float32"),
        ("float16", WITH_BF16, "bfloat16"),  # the card's decoder, the encoder on the host
        ("float16", WITHOUT_BF16, "float32"),
    ],
)
def test_the_encoder_follows_the_decoder_or_takes_the_fastest_host_dtype(
    card: bool, decoder_dtype: str, host_dtypes: tuple[str, ...], expected: str
):
    settings = resolve(decoder_dtype=decoder_dtype, host_dtypes=host_dtypes)
    assert settings.encoder_dtype == expected


def test_an_encoder_dtype_that_is_given_is_kept(card: bool):
    assert resolve(SpyreSettings(encoder_dtype="float32")).encoder_dtype == "float32"


@pytest.mark.usefixtures("no_card")
def test_an_encoder_dtype_that_the_host_lacks_is_refused():
    with pytest.raises(ValueError, match=r"encoder_dtype='bfloat16'.*float32"):
        resolve(SpyreSettings(encoder_dtype="bfloat16"), host_dtypes=WITHOUT_BF16)


@pytest.mark.usefixtures("no_card")
def test_without_a_bound_a_cpu_decodes_everything_together():
    # 1000 tokens are 16 blocks of 64.
    assert resolve(max_model_len=1000, max_num_seqs=4).max_batch_tkv == 4 * 1024


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "expected"),
    [
        (1024, 4, 4 * 1024),  # everything fits
        (8192, 32, config.CARD_MAX_BATCH_TKV),
        (1024, 1, 2 * 1024),  # the card decodes two rows at least
        (128_000, 4, 2 * 128_000),  # one sequence always fits
    ],
)
def test_without_a_bound_the_card_has_its_own(
    monkeypatch: pytest.MonkeyPatch, max_model_len: int, max_num_seqs: int, expected: int
):
    monkeypatch.setattr(config, "card_backend_available", lambda: True)
    settings = resolve(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert settings.max_batch_tkv == expected


def test_a_bound_holds_one_sequence_at_least_and_two_rows_on_the_card(card: bool):
    least = 2048 if card else 1024
    for bound in (least, 3000):
        settings = SpyreSettings(max_batch_tkv=bound)
        assert resolve(settings, max_model_len=1000).max_batch_tkv == bound
    with pytest.raises(ValueError, match=rf"max_batch_tkv={least - 1}.*{least}") as error:
        resolve(SpyreSettings(max_batch_tkv=least - 1), max_model_len=1000)
    assert "--max-model-len" in str(error.value)


@pytest.mark.parametrize(("given", "expected"), [(None, 1000), (10, 1000), (9000, 9000)])
def test_the_encoder_cache_holds_the_images_of_one_prompt(
    card: bool, given: int | None, expected: int
):
    settings = resolve(SpyreSettings(encoder_cache_tokens=given), max_model_len=1000)
    assert settings.encoder_cache_tokens == expected


def test_resolving_leaves_no_auto_and_is_repeatable(card: bool):
    given = SpyreSettings(enable_return_mm_embedding=True)
    settings = resolve(given)
    values = settings.model_dump()
    assert settings.resolved
    assert "auto" not in values.values()
    assert None not in values.values()
    assert resolve(settings) == settings
    assert settings.enable_return_mm_embedding
    assert not given.resolved, "the user's settings are left alone"


def test_resolved_settings_survive_the_way_to_another_process(card: bool):
    settings = resolve(SpyreSettings(enable_return_mm_embedding=True))
    carried = json.loads(json.dumps(settings.model_dump()))
    assert SpyreSettings.parse(carried) == settings


def test_the_summary_shows_every_setting_and_what_was_resolved(card: bool):
    summary = config.settings_summary(resolve(), mapping="LlavaNext")
    for name in SpyreSettings.model_fields:
        assert (f"{name}=" in summary) == (name != "resolved")
    assert summary.endswith("mapping=LlavaNext")


# -- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_num_seqs", "batch"), [(1, "2"), (2, "2"), (16, "16")])
def test_the_cards_environment_is_exported(
    monkeypatch: pytest.MonkeyPatch, max_num_seqs: int, batch: str
):
    expected = {
        "VLLM_DT_CHUNK_LEN": "512",
        "VLLM_DT_MAX_CONTEXT_LEN": "4096",
        "VLLM_DT_MAX_BATCH_SIZE": batch,
        "VLLM_DT_MAX_BATCH_TKV_LIMIT": "65536",
    }
    for name in expected:
        monkeypatch.setenv(name, "before")
    config.export_card_environment(
        chunk_size=512, context_len=4096, max_num_seqs=max_num_seqs, max_batch_tkv=65536
    )
    assert {name: os.environ[name] for name in expected} == expected


def test_processes_are_spawned_whatever_was_set(
    monkeypatch: pytest.MonkeyPatch, messages: list[logging.LogRecord]
):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    config.prepare_process_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert [record.levelname for record in messages] == ["WARNING"]
    assert "fork" in messages[0].getMessage()
    config.prepare_process_environment()
    assert len(messages) == 1, "spawn is nothing to warn of"


@pytest.mark.parametrize(("value", "own"), [(None, True), ("1", True), ("0", False)])
def test_the_engine_has_its_own_process_unless_told(
    monkeypatch: pytest.MonkeyPatch, value: str | None, own: bool
):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", value)
    assert config.engine_runs_in_own_process() == own


@pytest.mark.parametrize(
    ("value", "asked"),
    [(None, False), ("", False), ("0", False), ("1", True)],
)
def test_the_rust_front_end_is_noticed(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool
):
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
    assert config.rust_frontend_requested() == asked


# -- the other Spyre plugin -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugins", "installed", "warned"),
    [
        (None, True, True),
        (None, False, False),
        ("spyre_mm", True, False),
        ("spyre_mm,sendnn_inference", True, True),
        ("", True, False),
    ],
)
def test_a_second_spyre_plugin_is_explained_unless_it_is_opted_out_of(
    monkeypatch: pytest.MonkeyPatch,
    messages: list[logging.LogRecord],
    plugins: str | None,
    installed: bool,
    warned: bool,
):
    def distribution(name: str) -> object:
        if name == "sendnn-inference" and installed:
            return object()
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert register() == "vllm_spyre_mm.platform.SpyrePlatform"
    assert len(messages) == int(warned)
    if warned:
        assert messages[0].levelname == "ERROR"
        assert "VLLM_PLUGINS=spyre_mm" in messages[0].getMessage()
        assert "uninstall" in messages[0].getMessage()
