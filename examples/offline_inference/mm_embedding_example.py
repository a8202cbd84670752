# SPDX-License-Identifier: Apache-2.0
"""Compares two pictures by the vision features that the model was given of them.

Run it with ``python mm_embedding_example.py [MODEL] [--output FILE.safetensors]``.

MODEL is the path or hub name of a Granite Vision or LLaVA-Next checkpoint; the default is the
small one that comes with the package.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from vllm_spyre_mm.demo import checkpoint_path

PROMPT = "<|user|>\n{image}{question}\n<|assistant|>\n"
"""The prompt format of Granite Vision; `LLM.chat` would apply the checkpoint's own template."""


def draw_circle() -> Image.Image:
    """A red circle at the top left of a white picture."""
    picture = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 52, 52), fill=(215, 30, 40))
    return picture


def draw_square() -> Image.Image:
    """A blue square at the bottom right of a white picture."""
    picture = Image.new("RGB", (160, 100), "white")
    ImageDraw.Draw(picture).rectangle((102, 57, 138, 93), fill=(35, 75, 220))
    return picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare two pictures by their vision features.",
    )
    parser.add_argument("model", nargs="?", default=str(checkpoint_path()))
    parser.add_argument("--output", type=Path, help="save the embeddings to this safetensors file")
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    parser.add_argument("--dtype", default="auto", help="of the model (default: auto)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    llm = LLM(
        model=arguments.model,
        enable_return_mm_embedding=True,
        limit_mm_per_prompt={"image": 1},
        max_model_len=4096,
        enforce_eager=arguments.enforce_eager,
        dtype=arguments.dtype,
    )
    questions = {
        "circle": ("What is in the picture?", draw_circle()),
        "square": ("Where is the blue square?", draw_square()),
        "text only": ("Which colours do you know?", None),
    }
    prompts = [
        {"prompt": PROMPT.format(image="", question=question)}
        if picture is None
        else {
            "prompt": PROMPT.format(image="<image>\n", question=question),
            "multi_modal_data": {"image": picture},
        }
        for question, picture in questions.values()
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48))

    embeddings: dict[str, torch.Tensor] = {}
    for (name, (question, _)), output in zip(questions.items(), outputs, strict=True):
        completion = output.outputs[0]
        embedding = completion.mm_embedding  # None for a request without pictures
        shape = None if embedding is None else tuple(embedding.shape)
        print(f"{name}: {question} -> {completion.text!r}, mm_embedding: {shape}")
        if embedding is not None:
            embeddings[name] = embedding

    # One vector for a picture: the mean over its features.
    circle, square = (embedding.float().mean(dim=0) for embedding in embeddings.values())
    print(f"cosine similarity of the pictures: {F.cosine_similarity(circle, square, dim=0):.3f}")
    if arguments.output:
        save_file(embeddings, arguments.output)
        print(f"saved {', '.join(embeddings)} to {arguments.output}")


if __name__ == "__main__":
    main()
