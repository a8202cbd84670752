# SPDX-License-Identifier: Apache-2.0
"""Batches of made-up pictures and conversations; each depends on its number and the seed alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset
from transformers import LlavaNextProcessor

from demo_checkpoint.model import END, PATCH, SPECIAL_TOKENS, SYSTEM_PROMPT, TILE
from vllm_spyre_mm.demo.pictures import (
    COLOURS,
    KINDS,
    PLACES,
    Picture,
    Question,
    Task,
    random_picture,
    random_questions,
)

WORDS = ((*KINDS, "nothing"), (*COLOURS, "nothing"), ("top", "bottom"), ("left", "right"))
"""Words for a quarter of a picture: one of each group is right."""


@dataclass(frozen=True)
class Conversation:
    """Pictures, and questions about them that are asked one after another."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]
    system: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages, answers included."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": SYSTEM_PROMPT})
        for index, question in enumerate(self.questions):
            pictures = self.pictures if index == 0 else ()
            messages += Task(pictures, question).messages()
            messages.append({"role": "assistant", "content": question.answer})
        return messages


Batch = TypeVar("Batch")


class Batches(Dataset[Batch]):
    """Batches by number, each made when it is asked for.

    Args:
        processor: what makes the model's inputs.
        steps: batches that there are.
        batch_size: examples in each.
        seed: on which, with its number, each depends.
    """

    def __init__(
        self, processor: LlavaNextProcessor, steps: int, batch_size: int, seed: int
    ) -> None:
        self.processor = processor
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.steps


class Glances(Batches[tuple[torch.Tensor, torch.Tensor]]):
    """Batches for the warm-up, by number: whole pictures squeezed onto one tile each."""

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles (batch, 3, TILE, TILE), and `words_of_patches` of them (batch, patches, 4)."""
        rng = random.Random(f"glances-{self.seed}-{step}")
        pictures = [random_picture(rng) for _ in range(self.batch_size)]
        tiles = self.processor.image_processor(
            [picture.image for picture in pictures],
            image_grid_pinpoints=[[TILE, TILE]],
            return_tensors="pt",
        )["pixel_values"][:, 0]
        return tiles, torch.stack([words_of_patches(picture) for picture in pictures])


def words_of_patches(picture: Picture) -> torch.Tensor:
    """(patches, 4): for each group of `WORDS`, the number of the right word for each patch.

    A patch is described by what is drawn in its quarter of the picture.
    """
    quarters = []
    drawn = {shape.place: shape for shape in picture.shapes}
    for place in PLACES:
        shape = drawn.get(place)
        right = (shape.kind, shape.colour) if shape else ("nothing", "nothing")
        words = (*right, *place.split())
        quarters.append([group.index(word) for group, word in zip(WORDS, words, strict=True)])
    side = TILE // PATCH
    far = (torch.arange(side) >= side // 2).long()
    quarter = (2 * far[:, None] + far[None, :]).flatten()
    return torch.tensor(quarters)[quarter]


class Conversations(Batches[dict[str, torch.Tensor]]):
    """Training batches by number; each depends on its number and the seed alone."""

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """The model's inputs for one step, right-padded, and `labels` (-100: no loss)."""
        rng = random.Random(f"training-{self.seed}-{step}")
        kind = self._kind_of_batch(rng, step)
        count = self.batch_size // (2 if kind in ("large", "several-large") else 1)
        conversations = [_conversation(rng, kind) for _ in range(count)]
        return encode(self.processor, conversations)

    def _kind_of_batch(self, rng: random.Random, step: int) -> str:
        """Small single pictures first; later on every size, and several pictures at once."""
        progress = step / self.steps
        if progress < 0.35:
            weights = (0.85, 0.1, 0.0, 0.05, 0.0)
        else:
            weights = (0.25, 0.2, 0.25, 0.2, 0.1)
        kinds = ("small", "medium", "large", "several", "several-large")
        return rng.choices(kinds, weights)[0]


def _conversation(rng: random.Random, kind: str) -> Conversation:
    """A random conversation for one kind of batch."""
    if rng.random() < 0.06:
        pictures: tuple[Picture, ...] = ()
    elif kind.startswith("several"):
        size = rng.choice(("medium", "large")) if kind == "several-large" else "small"
        pictures = tuple(random_picture(rng, size) for _ in range(rng.choice((2, 2, 3))))
    else:
        pictures = (random_picture(rng, kind),)
    questions = random_questions(rng, pictures, count=rng.choice((1, 4, 6, 8)))
    return Conversation(pictures, tuple(questions), system=rng.random() < 0.1)


def encode(
    processor: LlavaNextProcessor, conversations: Sequence[Conversation]
) -> dict[str, torch.Tensor]:
    """Tensors of a batch of whole conversations; only answers and their end carry a label."""
    texts = [
        processor.apply_chat_template(conversation.messages(), tokenize=False)
        for conversation in conversations
    ]
    images = [picture.image for talk in conversations for picture in talk.pictures]
    batch = processor(
        text=texts,
        images=images or None,
        return_tensors="pt",
        text_kwargs={"padding": True, "padding_side": "right"},
    )
    tensors = {
        name: batch[name] for name in ("input_ids", "pixel_values", "image_sizes") if name in batch
    }
    tensors["labels"] = answer_labels(tensors["input_ids"])
    return tensors


def answer_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """Labels, shaped like `input_ids` (batch, length): token ids inside answers, else -100.

    An answer begins two tokens after ``<|assistant|>`` (a line break follows it), and ends with
    ``<|endoftext|>``.
    """
    start, end = SPECIAL_TOKENS.index("<|assistant|>"), SPECIAL_TOKENS.index(END)
    labels = torch.full_like(input_ids, -100)
    for row, tokens in enumerate(input_ids.tolist()):
        inside = False
        for column, token in enumerate(tokens):
            if inside:
                labels[row, column] = token
                inside = token != end
            elif column and tokens[column - 1] == start:
                inside = True
    return labels
