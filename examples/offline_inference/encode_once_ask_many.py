# SPDX-License-Identifier: Apache-2.0
"""Encodes a picture once, keeps its features, and asks about it without the picture.

Run it with ``python encode_once_ask_many.py``.
"""

import random
from typing import Any

from vllm import LLM, SamplingParams

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import Shape, draw_picture

QUESTIONS = ("What is in the picture?", "Where is the red circle?", "What colour is the square?")


def main() -> None:
    """Ask with the features alone."""
    shapes = [Shape("circle", "red", "top left"), Shape("square", "blue", "bottom right")]
    picture = draw_picture(shapes, (144, 144), rng=random.Random(0)).image
    llm: Any = LLM(
        model=str(checkpoint_path()),
        enable_return_mm_embedding=True,  # type: ignore[arg-type]  # the platform's keyword
        enable_mm_embeds=True,
        enforce_eager=True,
        max_model_len=2048,
    )

    def prompt(question: str, image: Any) -> Any:
        text = f"<|user|>\n<image>\n{question}\n<|assistant|>\n"
        return {"prompt": text, "multi_modal_data": {"image": [image]}}

    # No decoder runs for this one.
    encode = SamplingParams(max_tokens=1, extra_args={"return_mm_embedding": {"generate": False}})
    features = llm.generate(prompt("", picture), encode)[0].outputs[0].mm_embedding

    # No encoder runs for these; nothing is to be returned either.
    answer = SamplingParams(temperature=0, max_tokens=32, extra_args={"return_mm_embedding": False})
    outputs = llm.generate([prompt(question, features) for question in QUESTIONS], answer)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question} {output.outputs[0].text}")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
