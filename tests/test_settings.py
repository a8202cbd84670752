# SPDX-License-Identifier: Apache-2.0
"""What users give as settings is taken, or refused with a sentence."""

import json
from typing import Any

import pytest
from hypothesis import example
from hypothesis import given as over
from hypothesis import strategies as st

from vllm_spyre_mm.config import NOT_FOR_USERS, SpyreSettings


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
        "encode_ahead": False,
        "max_batch_tkv": 4096,
        "missing_features": "refuse",
        "encode_timeout_seconds": 60.0,
        "card": {"dynamic_chunk": False, "fullgraph": False},
    }
    assert SpyreSettings.parse(given).model_dump(exclude=set(NOT_FOR_USERS)) == given


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"enable_return_mm_embeding": True}, "enable_return_mm_embeding", "True"),
        ({"enable_return_mm_embedding": "true"}, "enable_return_mm_embedding", "'true'"),
        ({"enable_return_mm_embedding": 1}, "enable_return_mm_embedding", "1"),
        ({"max_batch_tkv": -1}, "max_batch_tkv", "-1"),
        ({"max_batch_tkv": 0}, "max_batch_tkv", "0"),
        ({"max_batch_tkv": "4096"}, "max_batch_tkv", "'4096'"),
        ({"encode_timeout_seconds": 0}, "encode_timeout_seconds", "0"),
        ({"encoder_cache_tokens": -5}, "encoder_cache_tokens", "-5"),
        ({"encoder_cache_tokens": 1.5}, "encoder_cache_tokens", "1.5"),
        ({"encoder_cache_tokens": True}, "encoder_cache_tokens", "True"),
        ({"backend": "cuda"}, "backend", "'cuda'"),
        ({"card": {"fullgrap": True}}, "card.fullgrap", "True"),
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


@example({"card": {}})
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
    assert settings.model_dump(exclude_unset=True) == given


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
