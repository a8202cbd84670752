# SPDX-License-Identifier: Apache-2.0
"""Draws a picture, asks about it, and shows the answers and the features that came back.

Run it with ``python -m vllm_spyre_mm.demo [--output FILE.png] [--seed N]``.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams

from vllm_spyre_mm.config import card_backend_available
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import (
    Picture,
    Question,
    draw_picture,
    questions_about,
    random_shapes,
)
from vllm_spyre_mm.multimodal.coloring import pca_figure
from vllm_spyre_mm.multimodal.feature_layout import FeatureLayout

PICTURE_SIZE = (192, 144)
"""Width and height of the picture in pixels: several tiles, so that there is a fine grid."""

SAMPLING = SamplingParams(temperature=0, max_tokens=48)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one question, and the picture's features.

    Attributes:
        api: the method that asked it.
        question: with its right answer.
        text: the model's answer.
        embedding: the features of the picture, ``(num_features, hidden_size)``.
        layout: the place of each feature.
    """

    api: str
    question: Question
    text: str
    embedding: torch.Tensor
    layout: FeatureLayout


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    options = _parse(arguments)
    rng = random.Random(options.seed)
    picture = draw_picture(random_shapes(rng, 2), PICTURE_SIZE, rng=rng)
    what, *others = questions_about(picture)
    detail = rng.choice([question for question in others if question.type in ("colour", "where")])
    answers = ask(picture, what, detail)
    for answer in answers:
        report(answer)
    first = answers[0]
    pca_figure(picture.image, first.embedding, first.layout).save(options.output)
    print(f"\nThe picture and its features: {options.output.resolve()}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_spyre_mm.demo",
        description="Draw a picture, ask about it, show the answers and the features.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mm_embedding_demo.png"),
        help="where the PNG goes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the picture (default: 0)")
    return parser.parse_args(arguments)


def ask(picture: Picture, in_text: Question, in_chat: Question) -> list[Answer]:
    """Ask one question with ``LLM.generate`` and one with ``LLM.chat``."""
    llm = LLM(
        model=str(checkpoint_path()),
        enable_return_mm_embedding=True,
        max_model_len=2048,
        # The model is so small that compiling it for a CPU takes longer than all that is asked of
        # it here.
        enforce_eager=not card_backend_available(),
    )
    prompt = f"<|user|>\n<image>\n{in_text.text}\n<|assistant|>\n"
    generated = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": picture.image}}, SAMPLING
    )
    message: Any = {
        "role": "user",
        "content": [
            {"type": "image_pil", "image_pil": picture.image},
            {"type": "text", "text": in_chat.text},
        ],
    }
    chatted = llm.chat([message], SAMPLING)
    # The engine writes a few lines when it ends: let it do so before the answers are printed.
    llm.llm_engine.engine_core.shutdown()
    return [_answer("LLM.generate", in_text, generated), _answer("LLM.chat", in_chat, chatted)]


def _answer(api: str, question: Question, outputs: list[RequestOutput]) -> Answer:
    completion: Any = outputs[0].outputs[0]  # the embedding is an attribute that vLLM lacks
    (item,) = completion.mm_embedding_info.items
    return Answer(api, question, completion.text, completion.mm_embedding, item.layout)


def report(answer: Answer) -> None:
    """Print a question, its answers, and the shape of the embedding."""
    shape = " x ".join(map(str, answer.embedding.shape))
    print(f"\n{answer.api}: {answer.question.text}")
    print(f"  answer:       {answer.text}")
    print(f"  right answer: {answer.question.answer}")
    print(f"  mm_embedding: {shape}, {answer.embedding.dtype}")


if __name__ == "__main__":
    main()
