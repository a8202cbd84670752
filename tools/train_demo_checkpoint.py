# SPDX-License-Identifier: Apache-2.0
"""Train the embedded demo checkpoint from scratch, on a CPU, in about twenty minutes on four cores.

    python tools/train_demo_checkpoint.py --output vllm_spyre_mm/demo/tiny_granite_vision

Pictures and conversations are drawn by `vllm_spyre_mm.demo.pictures` while training runs, pass
through the processor of transformers as they do in serving, and train transformers' own
`LlavaNextForConditionalGeneration`. Seeds are fixed: batch number n is always the same. At the
end the weights are rounded to bf16, examined on held-out pictures, and written to the folder.
"""

import argparse
from pathlib import Path

import torch
from demo_checkpoint.examination import examine
from demo_checkpoint.model import build_config, build_model, build_processor, save
from demo_checkpoint.training import train, warm_up

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.demo.pictures import held_out_tasks


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=checkpoint_path())
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up-steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    return parser.parse_args()


def main() -> None:
    """Train, round, examine and write."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    processor = build_processor()
    model = build_model(build_config(), args.seed)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count:,} parameters, {len(processor.tokenizer)} tokens")
    warm_up(model, processor, args)
    train(model, processor, args)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    save(model, processor, args.output)
    print("bf16 weights, computed in fp32:")
    examine(model.float(), processor, held_out_tasks(200))
    print("bf16 weights, computed in bf16:")
    examine(model.bfloat16(), processor, held_out_tasks(200))


if __name__ == "__main__":
    main()
