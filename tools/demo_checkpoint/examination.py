# SPDX-License-Identifier: Apache-2.0
"""Asks the trained model about pictures that it has not seen."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from vllm_spyre_mm.demo.pictures import Task


@torch.inference_mode()
def answer(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, tasks: Sequence[Task]
) -> tuple[list[str], list[float]]:
    """Greedy answers to a batch of tasks, and each answer's smallest margin.

    A margin is the distance between the two highest logits of a step, divided by Granite's
    `logits_scaling`: the difference of their log-probabilities.
    """
    texts = [
        processor.apply_chat_template(task.messages(), tokenize=False, add_generation_prompt=True)
        for task in tasks
    ]
    images = [image for task in tasks for image in task.images]
    inputs = processor(
        text=texts,
        images=images or None,
        return_tensors="pt",
        text_kwargs={"padding": True, "padding_side": "left"},
    ).to(dtype=model.dtype)
    output = model.generate(
        **inputs,
        max_new_tokens=48,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    best = torch.stack(output.logits, dim=1).float().topk(2).values
    margins = (best[..., 0] - best[..., 1]) / model.config.text_config.logits_scaling
    margins = margins.masked_fill(tokens == model.config.pad_token_id, math.inf)
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    return answers, margins.amin(dim=1).tolist()


def examine(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    tasks: Sequence[Task],
    batch_size: int = 20,
) -> int:
    """Print right answers by type of question, mistakes and margins; return the right ones."""
    ordered = sorted(tasks, key=lambda task: sum(im.width * im.height for im in task.images))
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    margins: list[float] = []
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        answers, smallest = answer(model, processor, group)
        margins += smallest
        for task, text in zip(group, answers, strict=True):
            total[task.question.type] += 1
            right[task.question.type] += text == task.question.answer
            if text != task.question.answer:
                sizes = [image.size for image in task.images]
                print(
                    f"  wrong: {task.question.text} {sizes} {text!r}, not {task.question.answer!r}"
                )
    for kind, count in sorted(total.items()):
        print(f"  {kind}: {right[kind]} of {count}")
    points = torch.tensor(sorted(margins)).quantile(torch.tensor([0.0, 0.01, 0.05, 0.5]))
    print(
        "  smallest margin per answer, in nats (min, 1 %, 5 %, median):",
        " ".join(f"{point:.2f}" for point in points.tolist()),
    )
    print(f"  right: {right.total()} of {len(ordered)}")
    return right.total()
