# SPDX-License-Identifier: Apache-2.0
"""Prints the figures of docs/supported-models.md: each architecture beside Transformers.

Parity: the requests of the end-to-end tests on their tiny checkpoints, in fp32. Speed: four
requests with a picture of 448 x 448 each (text models: 400 tokens of text each) and 32 generated
tokens, in bf16, on checkpoints that are large enough for arithmetic to matter; Transformers takes
them one by one. Both run with as many threads.

    python -m tools.compare_architectures
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from tests import architectures, granite4_vision, idefics3, llava_onevision
from tests.checkpoints import with_changes
from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy, relative_error
from tests.e2e.test_architectures import ARCHITECTURES
from tests.multimodal.mm_mappings.suite import picture
from tests.reference import Reference

TOKENS = 32
TEXT: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
VISION = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "patch_size": 14,
}
QFORMER = {
    "hidden_size": 512,
    "encoder_hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 3072,
}
TILED = ("llava_next", llava_onevision.MODEL_TYPE, granite4_vision.MODEL_TYPE)
TOWERS = ("llava", "mistral3", *idefics3.MODEL_TYPES, *TILED)
"""``model_type`` of the models that have one."""

GRANITE_VISION = architectures.llava_next(
    architectures.granite(),
    vision_config=architectures.siglip(),
    vision_feature_select_strategy="full",
    vision_feature_layer=[-3, -1],
)


def larger(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with a decoder of 80 M parameters and a tower of 25 M."""
    text = TEXT
    if hasattr(config.get_text_config(), "layer_types"):
        text = TEXT | {"layer_types": ["full_attention"] * TEXT["num_hidden_layers"]}
    if config.model_type not in TOWERS:
        changes = dict(text)
        if config.model_type == "granitemoehybrid":
            changes["shared_intermediate_size"] = TEXT["intermediate_size"]
            changes["mamba_d_head"] = 2 * TEXT["hidden_size"] // config.mamba_n_heads  # checked
        return with_changes(config, changes)
    side = 448 if config.model_type == "mistral3" else 224
    changes = {f"text_config.{name}": value for name, value in text.items()}
    changes |= {f"vision_config.{name}": value for name, value in VISION.items()}
    changes["vision_config.image_size"] = side
    if config.model_type == "mistral3":
        changes["vision_config.head_dim"] = VISION["hidden_size"] // VISION["num_attention_heads"]
    if config.model_type in TILED:
        tile = config.vision_config.image_size
        grid = [[each // tile * side for each in sides] for sides in config.image_grid_pinpoints]
        changes["image_grid_pinpoints"] = grid
    if config.model_type == granite4_vision.MODEL_TYPE:
        changes |= {f"qformer_config.{name}": value for name, value in QFORMER.items()}
    return with_changes(config, changes)


def parity(checkpoint: Path) -> str:
    """Answers that are equal, and the largest error of features, relative to the largest."""
    reference = Reference(checkpoint)
    tag = getattr(reference.processor, "image_token", None)
    asks = [replace(ask, tag=tag or "") for ask in parity_asks(54, seed=3) if tag or not ask.images]
    equal, error = 0, 0.0
    with engine(checkpoint, max_num_batched_tokens=128) as llm:
        outputs = llm.generate([ask.prompt for ask in asks], greedy(12), use_tqdm=False)
    for ask, output in zip(asks, outputs, strict=True):
        completion, images = output.outputs[0], list(ask.images)
        equal += list(completion.token_ids) == reference.generate(ask.text, images, 12)
        if images:
            expected = reference.features(ask.text, images)
            error = max(error, relative_error(completion.mm_embedding, expected))
    return f"{equal} of {len(asks)}, {error:.0e}"


def seconds(run: Callable[[int], None]) -> float:
    """The shorter of two runs."""
    times = []
    for number in range(2):
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    return min(times)


def speed(checkpoint: Path) -> str:
    """How many times as fast as Transformers."""
    reference = Reference(checkpoint, torch.bfloat16)
    tag = getattr(reference.processor, "image_token", None)
    options = {"dtype": "bfloat16", "enforce_eager": False, "enable_prefix_caching": False}

    def asks(number: int) -> list[Ask]:
        """Others at every call: encoded pictures are kept."""
        if not tag:
            return [Ask(f"{number} {i} and " * 90) for i in range(4)]
        return [Ask("What is it?", (picture(440 + 4 * number + i, 448),), tag) for i in range(4)]

    def theirs(number: int) -> None:
        for ask in asks(number):
            reference.model.generate(
                **reference.inputs(ask.text, list(ask.images)),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
            )

    with engine(checkpoint, max_num_batched_tokens=512, **options) as llm:

        def ours(number: int) -> None:
            prompts = [ask.prompt for ask in asks(number)]
            llm.generate(prompts, greedy(TOKENS, ignore_eos=True), use_tqdm=False)

        return f"{seconds(theirs) / seconds(ours):.1f}"


def main() -> None:
    granite_vision = {"LLaVA-Next, SigLIP, Granite (Granite Vision)": GRANITE_VISION}
    for name, config in (granite_vision | ARCHITECTURES).items():
        with tempfile.TemporaryDirectory() as folder:
            small, large = Path(folder, "small"), Path(folder, "large")
            architectures.save_checkpoint(small, config)
            architectures.save_checkpoint(large, larger(config))
            print(f"| {name} | {parity(small)} | {speed(large)} |", flush=True)


if __name__ == "__main__":
    main()
