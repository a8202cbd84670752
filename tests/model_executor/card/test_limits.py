# SPDX-License-Identifier: Apache-2.0
"""Known models are recognised by their published configurations; their limits are the table's."""

from typing import Any

import pytest
from transformers import GraniteConfig, LlamaConfig, Mistral3Config, PretrainedConfig

from vllm_spyre_mm.model_executor.card.limits import (
    KNOWN_MODELS,
    KnownConfiguration,
    find_known_model,
)

HOST = "x86_64"


def granite(**changes: Any) -> GraniteConfig:
    """Granite 3.3 8B, as it is published."""
    published = {
        "vocab_size": 49159,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    return GraniteConfig(**published | changes)


PUBLISHED: dict[str, PretrainedConfig] = {
    "Granite Vision 3.3 2B": granite(vocab_size=49156, hidden_size=2048, intermediate_size=8192),
    "Granite 3.3 8B": granite(),
    "Granite 4 8B (dense), 4.2 8B": granite(vocab_size=100352),
    "Granite 4.1 30B": granite(vocab_size=100352, num_hidden_layers=64, intermediate_size=32768),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    # Transformers' defaults are these two models.
    "Mistral Small 3.2 24B": Mistral3Config().text_config,
    "Ministral 3 8B": Mistral3Config(text_config={"model_type": "ministral3"}).text_config,
    "Ministral 3 14B": Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "hidden_size": 5120,
            "intermediate_size": 16384,
            "num_hidden_layers": 40,
        }
    ).text_config,
}


def test_every_known_model_is_published() -> None:
    assert list(PUBLISHED) == [model.name for model in KNOWN_MODELS]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_model_is_recognised_by_its_decoder(name: str) -> None:
    model = find_known_model(PUBLISHED[name], HOST)
    assert model is not None
    assert model.name == name


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 49155}, {"num_key_value_heads": 4}, {"max_position_embeddings": 4096}],
    ids=str,
)
def test_another_decoder_is_not_known(changes: dict[str, int]) -> None:
    assert find_known_model(granite(**changes), HOST) is None


def test_a_model_is_known_on_the_hosts_it_was_run_on() -> None:
    small = PUBLISHED["Mistral Small 3.2 24B"]
    assert find_known_model(small, "ppc64le") is not None
    assert find_known_model(small, "s390x") is None
    assert find_known_model(PUBLISHED["Ministral 3 14B"], "s390x") is not None


def default(name: str, *given: int | None) -> str:
    (model,) = (model for model in KNOWN_MODELS if model.name == name)
    cards, length, seqs = given
    assert cards is not None
    found = model.default(cards, length, seqs)
    return "none" if found is None else f"{found.max_model_len} x {found.max_num_seqs}"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("Granite Vision 3.3 2B", (1, None, None), "8192 x 16"),
        ("Granite Vision 3.3 2B", (2, None, None), "16384 x 16"),
        ("Granite Vision 3.3 2B", (8, None, None), "none"),
        ("Granite 3.3 8B", (1, None, None), "8192 x 4"),
        ("Granite 3.3 8B", (1, 2048, None), "3072 x 16"),
        ("Granite 3.3 8B", (1, 4096, None), "8192 x 4"),
        ("Granite 3.3 8B", (1, None, 5), "3072 x 16"),
        ("Granite 3.3 8B", (1, None, 17), "none"),
        ("Granite 3.3 8B", (1, 8192, 16), "none"),
        ("Llama 3.1 8B", (4, None, None), "32768 x 32"),
        ("Mistral Small 3.2 24B", (1, None, None), "none"),
    ],
)
def test_the_default_holds_what_the_user_gave(
    name: str, given: tuple[int | None, ...], expected: str
) -> None:
    assert default(name, *given) == expected


def test_the_nearest_configuration_has_as_many_cards_if_there_is_one() -> None:
    (model,) = (model for model in KNOWN_MODELS if model.name == "Granite 3.3 8B")
    assert model.nearest(KnownConfiguration(1, 8192, 16)).max_model_len == 3072
    assert model.nearest(KnownConfiguration(1, 8192, 8)).max_model_len == 8192
    assert model.nearest(KnownConfiguration(1, 2048, 32)).max_model_len == 3072
    assert model.nearest(KnownConfiguration(8, 8192, 4)).tensor_parallel_size == 4


def test_blocks_are_known_for_the_very_sizes_alone() -> None:
    (model,) = (model for model in KNOWN_MODELS if model.name == "Granite 4.1 30B")
    assert model.num_blocks(KnownConfiguration(4, 32768, 32)) == 2080
    assert model.num_blocks(KnownConfiguration(4, 32768, 16)) is None


def test_no_bound_is_above_what_its_rows_need() -> None:
    """131,072, or the product of the two others where the table sets nothing for the device."""
    for model in KNOWN_MODELS:
        for known in model.configurations:
            product = known.max_model_len * known.max_num_seqs
            assert known.max_batch_tkv in (product, 131072)
            assert (known.num_blocks is not None) == (known.tensor_parallel_size == 4)
