# SPDX-License-Identifier: Apache-2.0
"""Trains the model: the vision tower first, by the words for what it sees, and then everything."""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from demo_checkpoint.data import WORDS, Conversations, Glances


def answer_loss(
    model: LlavaNextForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens.

    Granite divides its logits by `logits_scaling`. Serving engines do so for LLaVA-Next too, but
    transformers' LLaVA-Next does not; it is done here so that served probabilities are right.
    """
    inputs = {name: batch[name] for name in batch if name != "labels"}
    labels = batch["labels"][:, 1:]
    # On a CPU the fused attention has a slow backward pass: plain attention wins while it fits.
    plain = batch["input_ids"].shape[1] <= 450
    model.set_attn_implementation("eager" if plain else "sdpa")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[labels != -100])
    logits = logits.float() / model.config.text_config.logits_scaling
    return torch.nn.functional.cross_entropy(logits, labels[labels != -100])


def project(model: LlavaNextForConditionalGeneration, tiles: torch.Tensor) -> torch.Tensor:
    """Projected features (tiles, patches, width) of `tiles` (tiles, 3, TILE, TILE)."""
    states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
    chosen = [states[layer] for layer in model.config.vision_feature_layer]
    return model.model.multi_modal_projector(torch.cat(chosen, dim=-1))


def warm_up(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    args: argparse.Namespace,
) -> None:
    """Teach the vision tower and the projector to tell shapes, colours and places apart.

    The features of a patch learn to point towards the decoder's embeddings of the words for it.
    The decoder learns to answer far sooner on features that already mean something to it.
    """
    directions = word_directions(model, processor)
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    weights = [weight for part in parts for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    data = Glances(processor, args.warm_up_steps, 4 * args.batch_size, args.seed)
    begin = time.monotonic()
    for step, (tiles, words) in enumerate(loader(data, args)):
        set_learning_rate(optimizer, learning_rate(step, len(data), 1.5 * args.lr))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = project(model, tiles).float()
        losses = [
            torch.nn.functional.cross_entropy((features @ rows.T).flatten(0, 1), right.flatten())
            for rows, right in zip(directions, words.unbind(-1), strict=True)
        ]
        optimize(optimizer, weights, sum(losses))
        if step % 50 == 49 or step + 1 == len(data):
            terms = " + ".join(f"{loss.item():.3f}" for loss in losses)
            seconds = time.monotonic() - begin
            print(f"warm-up {step + 1}/{len(data)}: loss {terms}, {seconds:.0f} s", flush=True)


def word_directions(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor
) -> list[torch.Tensor]:
    """For each group of `WORDS`, the embeddings of its words (words, width), of length 5.

    That length makes features certain of their words about as long as the embeddings are.
    """
    embeddings = model.get_input_embeddings().weight.detach()
    directions = []
    for group in WORDS:
        first = [processor.tokenizer.encode(" " + word)[-1] for word in group]
        directions.append(5 * torch.nn.functional.normalize(embeddings[first], dim=-1))
    return directions


def loader(data: Dataset[Any], args: argparse.Namespace) -> DataLoader[Any]:
    """`data` in order, made in other processes ahead of need."""
    return DataLoader(data, batch_size=None, num_workers=args.workers, prefetch_factor=4)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of `optimizer`, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def optimize(
    optimizer: torch.optim.Optimizer, weights: Sequence[torch.Tensor], loss: torch.Tensor
) -> None:
    """One step down the gradient of `loss`, clipped to a norm of 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine down to one per cent of `peak`."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    args: argparse.Namespace,
) -> None:
    """Train `model` in place for ``args.steps`` steps."""
    weights = list(model.parameters())
    seeing = [*model.model.vision_tower.parameters()]
    seeing += [*model.model.multi_modal_projector.parameters()]
    rest = [weight for weight in weights if all(weight is not other for other in seeing)]
    groups = [{"params": rest, "scale": 1.0}, {"params": seeing, "scale": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    data = Conversations(processor, args.steps, args.batch_size, args.seed)
    model.train()
    begin, average = time.monotonic(), 0.0
    for step, batch in enumerate(loader(data, args)):
        set_learning_rate(optimizer, learning_rate(step, args.steps, args.lr))
        loss = answer_loss(model, batch)
        optimize(optimizer, weights, loss)
        average += (loss.item() - average) / min(step + 1, 50)
        if step % 50 == 49 or step + 1 == args.steps:
            seconds = time.monotonic() - begin
            print(f"step {step + 1}/{args.steps}: loss {average:.4f}, {seconds:.0f} s", flush=True)
    model.set_attn_implementation("sdpa")
    model.eval()
