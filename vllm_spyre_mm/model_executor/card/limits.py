# SPDX-License-Identifier: Apache-2.0
"""Configurations that cards are known to run, and what is known of models that are in none.

From the table that IBM's own plug-in publishes (``config/model_configs.yaml`` of sendnn-inference
2.6.3); nothing here was tried on a card by this project. A model is recognised by its decoder,
which is what the card runs. Left out are models that this package does not serve: those with fp8
weights, hybrid and sliding-window Granite, and encoders.
"""

import math
from dataclasses import dataclass
from typing import Any

from vllm_spyre_mm.config import CARD_MAX_BATCH_TKV

MAX_NUM_SEQS = 32
"""Sequences that a model of no known configuration is run with at most."""

MAX_MODEL_LEN = 32768
"""Tokens of a sequence that such a model is run with at most."""


@dataclass(frozen=True, slots=True)
class KnownConfiguration:
    """Limits with which a model is known to run.

    Attributes:
        tensor_parallel_size: cards.
        max_model_len: tokens of a sequence.
        max_num_seqs: sequences that decode together.
        num_blocks: of the KV cache on each card; None: what the other limits need.
        max_batch_tkv: bound on batch × padded length, in tokens.
    """

    tensor_parallel_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int | None = None
    max_batch_tkv: int = CARD_MAX_BATCH_TKV

    def holds(self, asked: "KnownConfiguration") -> bool:
        """Whether it has at least what is asked for, on as many cards."""
        return (
            self.tensor_parallel_size == asked.tensor_parallel_size
            and self.max_model_len >= asked.max_model_len
            and self.max_num_seqs >= asked.max_num_seqs
            and self.max_batch_tkv >= asked.max_batch_tkv
        )

    def has_sizes_of(self, asked: "KnownConfiguration") -> bool:
        """Whether cards, length and sequences are the same."""
        return self._sizes() == asked._sizes()

    def distance(self, asked: "KnownConfiguration") -> tuple[float, float]:
        """How far it is from what is asked for: the number of cards counts before all else."""
        cards, *sizes = map(_octaves, self._sizes(), asked._sizes())
        return cards, sum(sizes)

    def _sizes(self) -> tuple[int, int, int]:
        return self.tensor_parallel_size, self.max_model_len, self.max_num_seqs

    def __str__(self) -> str:
        cards, length, seqs = self._sizes()
        return f"--tensor-parallel-size {cards} --max-model-len {length} --max-num-seqs {seqs}"


def _octaves(one: int, other: int) -> float:
    return abs(math.log2(one / other))


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """What a decoder is recognised by, in Transformers' words."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int = 131072
    num_attention_heads: int = 32
    num_key_value_heads: int = 8

    def is_of(self, text_config: Any) -> bool:
        """Whether a Transformers configuration has this decoder."""
        return all(
            getattr(text_config, name, None) == getattr(self, name) for name in self.__slots__
        )


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with the configurations in which it is known to run.

    Attributes:
        name: of the model, or models with the same decoder.
        decoder: what it is recognised by.
        configurations: in the order of their cards.
        machines: kinds of hosts (``platform.machine()``) that it is known on; None: all of them.
    """

    name: str
    decoder: DecoderSize
    configurations: tuple[KnownConfiguration, ...]
    machines: tuple[str, ...] | None = None

    def default(
        self, cards: int, max_model_len: int | None, max_num_seqs: int | None
    ) -> KnownConfiguration | None:
        """The configuration for what a user gave (None: not given), or None if there is none.

        Of several the longest, or, where a length is given, the one with the most sequences.
        """
        asked = KnownConfiguration(cards, max_model_len or 1, max_num_seqs or 1, None, 1)
        fitting = [each for each in self.configurations if each.holds(asked)]
        if max_model_len is None:
            return max(fitting, key=lambda each: each.max_model_len, default=None)
        return max(fitting, key=lambda each: each.max_num_seqs, default=None)

    def nearest(self, asked: KnownConfiguration) -> KnownConfiguration:
        """The configuration that differs least from what is asked for."""
        return min(self.configurations, key=lambda each: each.distance(asked))

    def num_blocks(self, asked: KnownConfiguration) -> int | None:
        """Blocks of the configuration with these sizes, if one is known and says so."""
        same = (each for each in self.configurations if each.has_sizes_of(asked))
        return next((each.num_blocks for each in same), None)


_FOUR_CARDS = KnownConfiguration(4, 32768, 32, num_blocks=8192)

_GRANITE_8B = (
    KnownConfiguration(1, 3072, 16, max_batch_tkv=3072 * 16),
    KnownConfiguration(1, 8192, 4, max_batch_tkv=8192 * 4),
    KnownConfiguration(2, 8192, 4, max_batch_tkv=8192 * 4),
    _FOUR_CARDS,
)

_MINISTRAL = (KnownConfiguration(1, 4096, 32), _FOUR_CARDS)

KNOWN_MODELS = (
    KnownModel(
        "Granite Vision 3.3 2B",
        DecoderSize("granite", 40, 2048, 49156),
        (KnownConfiguration(1, 8192, 16), KnownConfiguration(2, 16384, 16), _FOUR_CARDS),
    ),
    KnownModel("Granite 3.3 8B", DecoderSize("granite", 40, 4096, 49159), _GRANITE_8B),
    KnownModel(
        "Granite 4 8B (dense), 4.2 8B", DecoderSize("granite", 40, 4096, 100352), _GRANITE_8B
    ),
    KnownModel(
        "Granite 4.1 30B",
        DecoderSize("granite", 64, 4096, 100352),
        (KnownConfiguration(4, 32768, 32, num_blocks=2080),),
    ),
    KnownModel(
        "Llama 3.1 8B",
        DecoderSize("llama", 32, 4096, 128256),
        (
            KnownConfiguration(1, 3072, 16, max_batch_tkv=3072 * 16),
            KnownConfiguration(4, 16384, 4, num_blocks=8192),
            _FOUR_CARDS,
        ),
    ),
    KnownModel(
        "Mistral Small 3.2 24B",
        DecoderSize("mistral", 40, 5120, 131072),
        (KnownConfiguration(2, 8192, 32, max_batch_tkv=8192 * 32), _FOUR_CARDS),
        machines=("x86_64", "ppc64le"),
    ),
    KnownModel("Ministral 3 8B", DecoderSize("ministral3", 34, 4096, 131072, 262144), _MINISTRAL),
    KnownModel("Ministral 3 14B", DecoderSize("ministral3", 40, 5120, 131072, 262144), _MINISTRAL),
)
"""Every model of the table that this package serves."""


def find_known_model(text_config: Any, machine: str) -> KnownModel | None:
    """The model that a decoder's configuration is of, None if it is in no known configuration.

    Args:
        text_config: the decoder's Transformers configuration.
        machine: the host, as ``platform.machine()`` names it.
    """
    for model in KNOWN_MODELS:
        if model.decoder.is_of(text_config):
            return model if machine in (model.machines or (machine,)) else None
    return None
