# SPDX-License-Identifier: Apache-2.0
"""Logits do not depend on how a request is cut up, where it lies, or who is beside it; nor does the
embedding that it collects.

Each scenario is a handful of requests with shared beginnings and pictures, in blocks, chunks and
caches of drawn sizes. What a request gets is compared with one plain forward pass of Transformers
in fp32, token by token. ``--scenarios N`` runs N of them on each backend.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.worker.journey import (
    POISONS,
    VOCABULARY,
    Answer,
    Ask,
    Journey,
    Picture,
    PlainModel,
    Setup,
    save_checkpoint,
)
from vllm_spyre_mm.config import BackendName

TOLERANCE = 1e-4
"""Largest difference of a logit; the logits spread over several units."""

FOUND = (73,)
"""Scenarios that found an error once: 73, the stale row of a request that was preempted alone."""

BLOCKS_OF_A_REQUEST = 20

PATHS: tuple[tuple[BackendName, int], ...] = (
    ("eager", 32),
    ("inductor", 32),
    ("inductor", 40),
    ("sendnn", 32),
)
"""Backends with the width of heads; the compiled kernel takes multiples of 16."""


@dataclass(frozen=True)
class Document:
    """What prompts begin with: tokens, and pictures whose places do not overlap."""

    token_ids: tuple[int, ...]
    pictures: tuple[Picture, ...]


def make_document(number: int, length: int, rng: random.Random) -> Document:
    token_ids = tuple(rng.randrange(8, VOCABULARY) for _ in range(length))
    pictures, position = [], rng.randrange(max(1, length // 4))
    while position < length and len(pictures) < 4:
        span = rng.randrange(1, max(2, length // 3))
        pictures.append(make_picture(f"d{number}-{len(pictures)}", position, span, rng))
        position += span + rng.randrange(max(1, length // 4))
    return Document(token_ids, tuple(pictures))


def make_picture(identifier: str, offset: int, length: int, rng: random.Random) -> Picture:
    """Half of the pictures have positions without a feature, as line breaks are.

    One in three begins with such positions, as some models' do, up to a half of its length.
    """
    has_breaks = rng.random() < 0.5
    is_embed = [not (has_breaks and rng.random() < 0.2) for _ in range(length)]
    is_embed[rng.randrange(length)] = True
    if offset % 3 == 0:
        lead = length // 2
        is_embed[:lead] = [False] * lead
        is_embed[lead] = True
    return Picture(identifier, offset, tuple(is_embed))


def make_scenario(seed: int) -> tuple[Setup, list[Ask]]:
    """Sizes, and up to ten requests that fit them."""
    rng = random.Random(seed)
    block_size = rng.choice([4, 4, 4, 4, 8, 8, 64])
    longest = BLOCKS_OF_A_REQUEST * block_size
    documents = [make_document(number, longest, rng) for number in range(2)]
    asks = [
        make_ask(rng, documents, longest, number, arrival=rng.choice([0, 0, rng.randrange(25)]))
        for number in range(rng.randrange(2, 11))
    ]
    needed = max(-(-(len(ask.token_ids) + ask.max_tokens) // block_size) for ask in asks)
    setup = Setup(
        block_size=block_size,
        chunk_blocks=rng.randrange(1, 6),
        max_num_seqs=rng.choice([1, 2, 4, 6, 6]),
        num_blocks=1 + needed + rng.choice([0, needed, 4 * needed, 8 * needed, 8 * needed]),
        max_batch_tkv=block_size * (needed + 1) * rng.choice([2, 3, 16, 16]),
        encoder_cache=max(len(ask.token_ids) for ask in asks),
        poison=rng.choice(sorted(POISONS)),
        collects=rng.random() < 0.5,
    )
    return setup, asks


def make_ask(
    rng: random.Random, documents: list[Document], longest: int, number: int, arrival: int
) -> Ask:
    """A part of a document and then tokens of its own, perhaps with a picture among them."""
    max_tokens = rng.choice([1, 4, 10, 20])
    document = rng.choice(documents)
    shared = rng.choice([0, rng.randrange(longest), rng.randrange(longest)])
    shared = min(shared, longest - max_tokens - 1)
    own = rng.randrange(1, max(2, min(longest // 2, longest - max_tokens - shared)))
    pictures = [
        picture for picture in document.pictures if picture.offset + len(picture.is_embed) <= shared
    ]
    if own > 2 and rng.random() < 0.5:
        offset = rng.randrange(own - 1)
        span = rng.randrange(1, own - offset)
        pictures.append(make_picture(f"own-{number}", shared + offset, span, rng))
    own_ids = (rng.randrange(8, VOCABULARY) for _ in range(own))
    token_ids = (*document.token_ids[:shared], *own_ids)
    return Ask(token_ids, tuple(pictures), max_tokens, arrival)


@dataclass
class Tally:
    """What the scenarios were like, so that nothing is tested in name alone.

    Attributes:
        requests: in all.
        shapes: distinct (block size, chunk, prompt length, hit, pictures, rows).
        tokens: whose logits were compared.
        hits: requests that found a prefix in the cache.
        chunked: requests that were prefilled in several chunks.
        batched: requests that decoded beside others.
        pictured: requests with pictures.
        collected: embeddings that were returned.
        error: largest difference of a logit.
    """

    requests: int = 0
    tokens: int = 0
    hits: int = 0
    chunked: int = 0
    batched: int = 0
    pictured: int = 0
    collected: int = 0
    error: float = 0.0

    def __post_init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def add(self, setup: Setup, ask: Ask, answer: Answer, error: float) -> None:
        assert answer.hit is not None
        self.requests += 1
        self.tokens += len(answer.token_ids)
        self.hits += answer.hit > 0
        self.chunked += answer.chunks > 1
        self.batched += answer.rows > 1
        self.pictured += bool(ask.pictures)
        self.collected += answer.embedding is not None
        self.error = max(self.error, error)
        shape = (setup.block_size, setup.chunk_blocks, len(ask.token_ids), answer.hit)
        self.shapes.add((*shape, len(ask.pictures), answer.rows))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough to be shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("backend", "head_dim"), PATHS)
def test_logits_are_those_of_a_plain_forward_pass(
    backend: BackendName, head_dim: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = save_checkpoint(tmp_path, head_dim)
    plain, journey, tally = PlainModel(checkpoint), Journey(checkpoint, backend), Tally()
    count = request.config.getoption("--scenarios")

    for seed in (*range(count), *FOUND):
        setup, asks = make_scenario(seed)
        for number, answer in enumerate(journey.serve(setup, asks)):
            told = f"request {number} of scenario {seed}"
            assert len(answer.token_ids) == asks[number].max_tokens, told
            logits = torch.stack(answer.logits)
            assert logits.isfinite().all(), f"{told} read poison"
            expected = plain.logits(asks[number], answer.token_ids)
            error = float((logits - expected).abs().max())
            assert error < TOLERANCE, told
            if setup.collects and asks[number].pictures:
                features = torch.cat([picture.features for picture in asks[number].pictures])
                assert answer.embedding is not None, told
                assert torch.equal(answer.embedding, features), told
            else:
                assert answer.embedding is None, told
            tally.add(setup, asks[number], answer, error)
    print(f"\n{backend}, heads of {head_dim}: {tally}, {len(tally.shapes)} shapes")
    assert len(tally.shapes) > 3 * count
    for name in ("hits", "chunked", "batched", "pictured", "collected"):
        assert getattr(tally, name) > tally.requests / 20, name


@pytest.mark.parametrize("lead", [3, 4, 5, 9])
def test_a_chunk_may_end_between_an_images_place_and_its_first_feature(
    tmp_path: Path, lead: int
) -> None:
    """Its placeholder begins with tokens that are no features; chunks have 4."""
    journey = Journey(save_checkpoint(tmp_path, 32), "eager")
    picture = Picture("late", 4, (*[False] * lead, True, True, False, True))
    setup = Setup(
        block_size=4,
        chunk_blocks=1,
        max_num_seqs=2,
        num_blocks=20,
        max_batch_tkv=128,
        encoder_cache=32,
        collects=True,
    )
    (answer,) = journey.serve(setup, [Ask(tuple(range(8, 32)), (picture,), max_tokens=2)])
    assert answer.embedding is not None
    assert torch.equal(answer.embedding, picture.features)
