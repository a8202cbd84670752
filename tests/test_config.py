# SPDX-License-Identifier: Apache-2.0
"""Settings are resolved once, for the card and without it."""

import json

import pytest

from tests.resolved import WITH_BF16, WITHOUT_BF16, resolve
from vllm_spyre_mm import config
from vllm_spyre_mm.config import NOT_FOR_USERS, SpyreSettings


@pytest.fixture(params=[False, True], ids=["without card", "with card"])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test runs as if ``torch_sendnn`` was absent, and as if it was there."""
    monkeypatch.setattr(config, "card_backend_available", lambda: request.param)
    return request.param


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "card_backend_available", lambda: False)


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
        (1024, 1, 1024),
        (200_000, 4, 200_000),  # one sequence always fits
    ],
)
def test_without_a_bound_the_card_has_its_own(
    monkeypatch: pytest.MonkeyPatch, max_model_len: int, max_num_seqs: int, expected: int
):
    monkeypatch.setattr(config, "card_backend_available", lambda: True)
    settings = resolve(max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    assert settings.max_batch_tkv == expected


def test_a_bound_holds_one_sequence_at_least(card: bool):
    least = 1024
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
    """Of one that is computed and of the next one, by default beside a card."""
    settings = resolve(SpyreSettings(encoder_cache_tokens=given), max_model_len=1000)
    beside = card and given is None
    assert settings.encoder_cache_tokens == (2000 if beside else expected)


def test_resolving_leaves_no_auto_and_is_repeatable(card: bool):
    given = SpyreSettings(enable_return_mm_embedding=True)
    settings = resolve(given)
    values = settings.model_dump()
    assert settings.resolved
    assert "auto" not in values.values()
    assert [name for name, value in values.items() if value is None] == ["engine_memory_bytes"]
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
        assert (f"{name}=" in summary) == (name not in NOT_FOR_USERS)
    assert summary.endswith("mapping=LlavaNext")
