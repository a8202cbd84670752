# SPDX-License-Identifier: Apache-2.0
"""One answer of vLLM's own CPU build, which runs this file in its environment.

Its arguments are one JSON object; the last line that it prints is another one, with the answer.
"""

import json
import sys
from typing import Any


def main(asked: dict[str, Any]) -> None:
    """Answer a prompt with one picture, greedily.

    Args:
        asked: ``model``, ``transfer`` (fields of the EC connector's configuration), ``prompt``,
            ``picture`` (a file) and ``max_tokens``.
    """
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.config import ECTransferConfig

    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=2,
        kv_cache_memory_bytes=64 << 20,
        ec_transfer_config=ECTransferConfig(**asked["transfer"]),
    )
    data = {"image": [Image.open(asked["picture"]).convert("RGB")]}
    prompt: Any = {"prompt": asked["prompt"], "multi_modal_data": data}
    parameters = SamplingParams(temperature=0, max_tokens=asked["max_tokens"])
    (output,) = llm.generate(prompt, parameters)
    print(json.dumps({"token_ids": list(output.outputs[0].token_ids)}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
