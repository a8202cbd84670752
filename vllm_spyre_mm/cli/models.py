# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm models``: what is served, and whether one checkpoint is. No weights are read."""

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_spyre_mm.multimodal.mm_mappings import MMUtils

SUMMARY = "list the architectures that are served, or check one model's configuration"

LIMITS = """\
Limits of all: no audio; no quantised weights, no LoRA, no sliding windows. A card
wants heads of 128; Granite's are padded to it, and Llama's without RoPE scaling and biases in the
attention."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a folder with a config.json, such a file, or a hub name; left out: list everything",
    )


def run(arguments: argparse.Namespace) -> int:
    """List, or check; the exit status is 1 for a model that is not served."""
    if arguments.model is None:
        print("\n".join(_listing()))
        return 0
    from vllm_spyre_mm.multimodal.lookup import look_up

    try:
        _, mapping = look_up(arguments.model)
    except (OSError, ValueError) as error:
        print(f"{arguments.model}: {error}", file=sys.stderr)
        return 1
    print("\n".join(_description(mapping)))
    return 0


def _listing() -> list[str]:
    from vllm_spyre_mm.compat import ensure_torchvision_importable

    ensure_torchvision_importable()  # Transformers looks for it
    import transformers

    from vllm_spyre_mm.model_executor.models.decoders import DECODERS
    from vllm_spyre_mm.multimodal.mm_mappings import MAPPINGS
    from vllm_spyre_mm.multimodal.mm_mappings.not_yet import NOT_YET
    from vllm_spyre_mm.multimodal.mm_mappings.not_yet_architectures import NAMES

    lines = ["Served, by model_type:"]
    for mapping in MAPPINGS:
        for name in mapping.config_classes:
            library, _, class_name = name.partition(".")
            if library == "transformers":
                model_type = getattr(transformers, class_name).model_type
                lines.append(f"  {model_type:18} {mapping.__name__:14} {mapping.summary}")
    lines += ["", "Decoders, with the RoPE types that they support:"]
    lines += [f"  {name:18} {', '.join(each.rope_types)}" for name, each in DECODERS.items()]
    lines += ["", LIMITS, "", "Not yet:"]
    lines += [f"  {name:18} {why}" for name, why in NOT_YET.items()]
    lines += ["", "Not yet, by vLLM's name of the architecture:"]
    for why, names in NAMES.items():
        lines += [f"  {why}", *_wrapped(names)]
    return lines


def _wrapped(names: str) -> list[str]:
    """Lines of names, none broken."""
    return textwrap.wrap(
        " ".join(names.split()), 96, initial_indent="      ", subsequent_indent="      "
    )


def _description(mapping: "MMUtils") -> list[str]:
    """Lines that describe the model as it would be built, and whether a card could run it."""
    import torch

    from vllm_spyre_mm.multimodal.mm_mappings import UnsupportedModelError

    options = mapping.kv_cache_options()
    text = mapping.text_config
    lines = [
        f"served by {type(mapping).__name__} ({mapping.summary})",
        f"  decoder   {text.model_type}, {options.num_layers} layers, "
        f"{options.num_kv_heads} KV heads of {options.head_dim}",
    ]
    if mapping.encoder_summary is not None:
        lines.append(f"  vision    {mapping.encoder_summary}")
    token_bytes = options.token_bytes(torch.bfloat16)
    lines.append(f"  KV cache  {token_bytes / 1024:g} KiB a token in bfloat16")
    try:
        card = f"heads of {mapping.kv_cache_options(for_card=True).head_dim}"
    except UnsupportedModelError as error:
        card = f"no: {error}"
    return [*lines, f"  card      {card}"]
