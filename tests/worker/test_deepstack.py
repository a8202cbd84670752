# SPDX-License-Identifier: Apache-2.0
"""Deepstack from the features that a request has to its logits, however the request is cut up.

LLaVA-Next with a decoder of four layers, made to have two levels, before layers that no published
model has them at, and not in their order. Beside it Transformers' decoder layers, one by one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests import architectures
from tests.worker.journey import VOCABULARY, Ask, Journey, Picture, PlainModel, Setup
from vllm_spyre_mm.config import BackendName
from vllm_spyre_mm.model_executor.models.composition import CompositionConfig
from vllm_spyre_mm.multimodal.mm_mappings.llava_next import LlavaNext

LAYERS = (2, 0)
TOLERANCE = 1e-4


class Stacked(LlavaNext):
    """LLaVA-Next whose features have levels."""

    layers = LAYERS

    @property
    def feature_levels(self) -> int:
        return len(self.layers)

    def composition(self, for_card: bool) -> CompositionConfig:
        config = super().composition(for_card)
        config.deepstack_layers = self.layers
        return config


class Elsewhere(Stacked):
    """The same one layer later."""

    layers = (3, 1)


class PlainStacked(PlainModel):
    """Levels are added where the request has features, before the layers of :data:`LAYERS`."""

    def _decode(self, embeds: torch.Tensor, ask: Ask) -> torch.Tensor:
        decoder = self.model.model.language_model
        positions = torch.arange(embeds.shape[1]).unsqueeze(0)
        rotation = decoder.rotary_emb(embeds, positions)
        mask = torch.full((embeds.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        hidden = embeds
        for number, layer in enumerate(decoder.layers):
            for level, before in enumerate(LAYERS, start=1):
                if before == number:
                    hidden = hidden + self._level(level, embeds, ask)
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotation
            )
        return decoder.norm(hidden)

    def _level(self, level: int, embeds: torch.Tensor, ask: Ask) -> torch.Tensor:
        added, width = torch.zeros_like(embeds), embeds.shape[-1]
        for picture in ask.pictures:
            positions = picture.offset + torch.tensor(picture.is_embed).nonzero()[:, 0]
            added[0, positions] = picture.features[:, level * width : (level + 1) * width]
        return added


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = architectures.mistral(num_hidden_layers=4, head_dim=32)
    path = tmp_path_factory.mktemp("stacked")
    return architectures.save_checkpoint(path, architectures.llava_next(text))


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> PlainStacked:
    return PlainStacked(checkpoint)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mapping_of(checkpoint: Path, served: type[Stacked] = Stacked) -> Stacked:
    return served(AutoConfig.from_pretrained(checkpoint))


def picture(identifier: str, offset: int, length: int) -> Picture:
    """Every fourth position is no feature's."""
    is_embed = tuple(place % 4 != 3 for place in range(length))
    return Picture(identifier, offset, is_embed, levels=len(LAYERS))


SHARED = tuple(8 + number * 7 % (VOCABULARY - 8) for number in range(40))

ASKS = {
    "a text": Ask(SHARED[:9], (), 3),
    "a picture across chunks": Ask(SHARED[:30], (picture("a", 3, 21),), 5),
    "a prefix hit inside of a picture": Ask(
        (*SHARED[:17], *range(30, 42)), (picture("a", 3, 21),), 5, 4
    ),
    "two pictures": Ask(SHARED, (picture("a", 3, 21), picture("b", 26, 9)), 3, 1),
    "a text after them": Ask(SHARED[5:38], (), 4, 2),
}

SETUP = Setup(
    block_size=4,
    chunk_blocks=2,
    max_num_seqs=4,
    num_blocks=80,
    max_batch_tkv=1024,
    encoder_cache=64,
    collects=True,
)


@pytest.mark.parametrize("backend", ["eager", "inductor", "sendnn"])
def test_logits_are_those_of_layers_that_get_their_level(
    checkpoint: Path, plain: PlainStacked, backend: BackendName
) -> None:
    journey = Journey(checkpoint, backend, mapping_of(checkpoint))
    answers = journey.serve(SETUP, list(ASKS.values()))
    for (name, ask), answer in zip(ASKS.items(), answers, strict=True):
        expected = plain.logits(ask, answer.token_ids)
        error = float((torch.stack(answer.logits) - expected).abs().max())
        assert error < TOLERANCE * float(expected.abs().max()), name
        if ask.pictures:
            features = torch.cat([each.features for each in ask.pictures])
            assert answer.embedding is not None
            assert torch.equal(answer.embedding, features), name
    hit = answers[2].hit
    assert hit is not None
    assert 3 < hit < 24, "not inside of the picture"
    assert max(answer.rows for answer in answers) > 1


def test_a_level_one_layer_late_is_found(checkpoint: Path, plain: PlainStacked) -> None:
    """What is measured above is far from rounding."""
    journey = Journey(checkpoint, "eager", mapping_of(checkpoint, Elsewhere))
    ask = ASKS["a picture across chunks"]
    (answer,) = journey.serve(SETUP, [ask])
    expected = plain.logits(ask, answer.token_ids)
    error = float((torch.stack(answer.logits) - expected).abs().max())
    assert error > 100 * TOLERANCE * float(expected.abs().max())
