# SPDX-License-Identifier: Apache-2.0
"""Streams an answer about a picture from a server, and reads the embedding from the last chunk.

Start a server first, with a checkpoint of your own or the one that comes with the package:

    vllm serve PATH --device spyre --enable-return-mm-embedding

and run ``python streaming_client.py [PICTURE] [--address http://localhost:8000]``.
"""

import argparse
import base64
import io
import random
from pathlib import Path

from openai import OpenAI

from vllm_spyre_mm.demo.pictures import Shape, draw_picture
from vllm_spyre_mm.payload import decode_mm_embedding


def picture_bytes(path: Path | None) -> bytes:
    """The picture in a file, or a drawn one."""
    if path is not None:
        return path.read_bytes()
    buffer = io.BytesIO()
    shapes = [Shape("circle", "red", "top left")]
    draw_picture(shapes, (120, 120), rng=random.Random(0)).image.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Ask and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--address", default="http://localhost:8000")
    parser.add_argument("--question", default="What is in the picture?")
    options = parser.parse_args()

    client = OpenAI(base_url=f"{options.address}/v1", api_key="none")
    encoded = base64.b64encode(picture_bytes(options.picture)).decode()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
                    {"type": "text", "text": options.question},
                ],
            }
        ],
        temperature=0,
        max_tokens=32,
        stream=True,
        extra_body={"return_mm_embedding": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            payload = getattr(choice, "mm_embedding", None)
            if payload is not None:
                print(f"\nmm_embedding: {tuple(decode_mm_embedding(payload).shape)}")


if __name__ == "__main__":
    main()
