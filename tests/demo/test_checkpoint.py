# SPDX-License-Identifier: Apache-2.0
"""The embedded checkpoint loads with plain transformers, and answers questions rightly."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vllm_spyre_mm.compat import ensure_torchvision_importable
from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import (
    Task,
    draw_picture,
    held_out_tasks,
    questions_without_picture,
)

ensure_torchvision_importable()

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from tools.demo_checkpoint.examination import answer  # noqa: E402

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint_path()).eval()


def test_held_out_pictures_are_answered_rightly(model: Any, processor: Any) -> None:
    tasks = held_out_tasks(200)
    tasks.sort(key=lambda task: sum(image.width * image.height for image in task.images))
    wrong = []
    for start in range(0, len(tasks), 20):
        group = tasks[start : start + 20]
        for task, text in zip(group, answer(model, processor, group)[0], strict=True):
            if text != task.question.answer:
                wrong.append((task.question, text))
    assert len(wrong) <= 10, wrong


def test_questions_without_a_picture_are_answered_rightly(model: Any, processor: Any) -> None:
    tasks = [Task((), question) for question in questions_without_picture()]
    assert answer(model, processor, tasks)[0] == [task.question.answer for task in tasks]


def test_tensors_are_finite_and_small() -> None:
    path = checkpoint_path() / "model.safetensors"
    assert path.stat().st_size <= 12_000_000
    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
        assert not any("vision_tower.head" in name or "vision_model.head" in name for name in names)
        for name in names:
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert bool(tensor.isfinite().all()), name


def test_files_name_no_folder_and_no_other_model() -> None:
    for path in checkpoint_path().glob("*.json"):
        assert '"/' not in path.read_text().replace('"/"', ""), path.name
    config = json.loads((checkpoint_path() / "config.json").read_text())
    assert not config.get("_name_or_path")
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["text_config"]["model_type"] == "granite"
    assert config["vision_config"]["model_type"] == "siglip_vision_model"


def test_chat_template(processor: Any) -> None:
    def prompt(*messages: dict[str, Any]) -> str:
        return processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )

    text, image = {"type": "text", "text": QUESTION}, {"type": "image"}
    expected = f"<|user|>\n<image>\n{QUESTION}\n<|assistant|>\n"
    assert prompt({"role": "user", "content": [image, text]}) == expected
    assert prompt({"role": "user", "content": [text, image]}) == expected
    assert prompt({"role": "user", "content": f"<image>\n{QUESTION}"}) == expected
    url = {"type": "image_url", "image_url": {"url": "data:"}}
    assert prompt({"role": "user", "content": [url, text]}) == expected
    assert prompt(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        {"role": "user", "content": "Where?"},
    ) == (
        f"<|system|>\nBe brief.\n<|user|>\n<image>\n<image>\n{QUESTION}\n<|assistant|>\n"
        "a red circle<|endoftext|>\n<|user|>\nWhere?\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    "text", ["\u00e5ngstr\u00f6m \u65e5\u672c \U0001f600", "tab\tand\nline", "  "]
)
def test_any_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    tokenizer = processor.tokenizer
    tokens = tokenizer.encode(text)
    assert max(tokens) < len(tokenizer) <= 512
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize(
    ("size", "features"),
    [
        ((48, 48), 36 + 6 * 7),
        ((48, 40), 36 + 6 * 7),
        ((96, 48), 36 + 6 * 13),
        ((48, 96), 36 + 12 * 7),
        ((96, 96), 36 + 12 * 13),
        ((400, 400), 36 + 18 * 19),
    ],
)
def test_feature_counts(processor: Any, size: tuple[int, int], features: int) -> None:
    """`size` is (width, height) in pixels; each row of the unpadded grid ends with a newline."""
    image = draw_picture([], size).image
    inputs = processor(text="<image>", images=image, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == features
