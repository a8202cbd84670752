# SPDX-License-Identifier: Apache-2.0
"""One model in one process, measured from outside; run by path, also in other environments.

    python driver.py '{"model": PATH, "kind": "vllm", "engine": {...}}'

It answers each JSON line on its standard input with one on its standard output that begins with
``@@``. Kind ``vllm`` runs whatever vLLM platform is installed, ``transformers`` one request after
the other. Nothing of this project is imported: the same file measures the references.
"""

import importlib
import json
import random
import resource
import sys
import threading
import time
from typing import Any

PROMPT = "<|user|>\n<image>\n{question}\n<|assistant|>\n"
QUESTION = "What is in the picture?"
SIDE = 448
IMPORTS = {"vllm": ["vllm", "vllm.entrypoints.llm"], "transformers": ["transformers"]}
"""What is imported before the clock starts, besides what the command line names."""


def picture(seed: int) -> Any:
    """Noise, the same for the same seed."""
    from PIL import Image

    return Image.frombytes("RGB", (SIDE, SIDE), random.Random(seed).randbytes(3 * SIDE * SIDE))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


class PeakMemory:
    """Watches :func:`anonymous_bytes` from a thread; the files of a checkpoint do not count."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.005)


class Vllm:
    """Commands for an ``LLM``."""

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        from vllm import LLM

        self.memory = PeakMemory()
        self.llm = LLM(model=model, **engine)

    def close(self) -> None:
        """End the engine's process."""
        self.llm.llm_engine.engine_core.shutdown()

    def workload(
        self,
        requests: int,
        max_tokens: int,
        seed: int,
        extra_args: dict[str, Any] | None = None,
        question: str = QUESTION,
    ) -> dict[str, Any]:
        """Requests with a picture each, all at once; seconds, preprocessing included."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
        )
        prompts = [
            {
                "prompt": PROMPT.format(question=question),
                "multi_modal_data": {"image": picture(seed + i)},
            }
            for i in range(requests)
        ]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - started,
            "prompt_tokens": len(outputs[0].prompt_token_ids),
            "peak_bytes": self.memory.peak - self.memory.before,
        }

    def count(self, metric: str) -> dict[str, Any]:
        """A counter of vLLM's metrics; the engine was asked to keep them."""
        found = [each for each in self.llm.get_metrics() if each.name == metric]
        return {"value": sum(each.value for each in found)}

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of each decode step of ``batch`` sequences; the engine in this process."""
        from vllm import SamplingParams

        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        model_seconds = 0.0
        forward = runner.spyre_model.forward

        def timed(inputs: Any) -> Any:
            nonlocal model_seconds
            started = time.perf_counter()
            logits = forward(inputs)
            model_seconds = time.perf_counter() - started
            return logits

        params = SamplingParams(
            temperature=0.0,
            max_tokens=steps + 4 * batch + 8,
            ignore_eos=True,
            detokenize=False,  # the front end's work, in another process otherwise
        )
        rng = random.Random(batch)
        for i in range(batch):
            tokens = [rng.randrange(10, 500) for _ in range(context)]
            self.llm.llm_engine.add_request(
                f"{time.time()}-{i}", {"prompt_token_ids": tokens}, params
            )
        runner.spyre_model.forward = timed
        total, model = [], []
        while self.llm.llm_engine.has_unfinished_requests():
            started = time.perf_counter()
            self.llm.llm_engine.step()
            if len(runner.decodes) == batch and not core.scheduler.waiting:
                total.append(time.perf_counter() - started)
                model.append(model_seconds)
        runner.spyre_model.forward = forward
        return {"seconds": total[2:-4], "model_seconds": model[2:-4]}


class Transformers:
    """The workload, one request after the other, in fp32."""

    def close(self) -> None:
        """Nothing outlives this process."""

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        import torch
        from transformers import AutoProcessor, LlavaNextForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(model)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(model, dtype=torch.float32)

    def workload(self, requests: int, max_tokens: int, seed: int) -> dict[str, Any]:
        """As :meth:`Vllm.workload`."""
        import torch

        started = time.perf_counter()
        for i in range(requests):
            prompt = PROMPT.format(question=QUESTION)
            inputs = self.processor(text=prompt, images=picture(seed + i), return_tensors="pt")
            with torch.inference_mode():
                self.model.generate(
                    **inputs, max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False
                )
        return {"seconds": time.perf_counter() - started}


def main() -> None:
    """Start, say how long it took, and obey."""
    arguments = json.loads(sys.argv[1])
    started = time.perf_counter()
    for name in IMPORTS[arguments["kind"]] + arguments.get("imports", []):
        importlib.import_module(name)
    imported = time.perf_counter()
    target = {"vllm": Vllm, "transformers": Transformers}[arguments["kind"]](
        arguments["model"], arguments.get("engine", {})
    )
    reply = {
        "import_seconds": imported - started,
        "start_seconds": time.perf_counter() - imported,
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print("@@" + json.dumps(reply), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = getattr(target, command.pop("do"))(**command)
        print("@@" + json.dumps(reply), flush=True)
    target.close()


if __name__ == "__main__":
    main()
