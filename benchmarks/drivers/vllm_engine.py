# SPDX-License-Identifier: Apache-2.0
"""Commands for an ``LLM`` of whatever vLLM platform is installed."""

import itertools
import random
import threading
import time
from typing import Any

from clocks import Stopwatch, Tokens
from workload import PROMPT, QUESTION, SIDES, picture


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
        sides: tuple[int, int] = SIDES,
    ) -> dict[str, Any]:
        """Requests with a picture each, all at once; seconds, preprocessing included."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
        )
        prompts = [
            {
                "prompt": PROMPT.format(question=question),
                "multi_modal_data": {"image": picture(seed + i, sides)},
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

    def pictures(self, requests: int, max_tokens: int, seed: int, text: bool) -> dict[str, Any]:
        """Requests with a picture each come at once; the engine in this process.

        Args:
            requests: how many.
            max_tokens: of each.
            seed: of the pictures.
            text: whether a request without a picture is being answered meanwhile.

        Returns:
            ``first``: seconds from the last request's arrival to each one's first token;
            ``between``: seconds between two tokens of the text until the last of these, the first
            of them since the last request's arrival.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        tokens = Tokens(engine)
        if text:
            endless = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)
            engine.add_request("text", "Tell a story.", endless)
            for _ in range(8):
                tokens.step()
        before = len(tokens.times["text"])
        names = [f"{seed}-{i}" for i in range(requests)]
        for i, name in enumerate(names):
            prompt = {
                "prompt": PROMPT.format(question=QUESTION),
                "multi_modal_data": {"image": picture(seed + i, SIDES)},
            }
            engine.add_request(name, prompt, params)
        started = time.perf_counter()
        while not all(map(tokens.times.get, names)) or len(tokens.times["text"]) < before + text:
            tokens.step()
        if text:
            engine.abort_request(["text"])
        while engine.has_unfinished_requests():
            engine.step()
        beside = [started, *tokens.times["text"][before:]]
        return {
            "first": [tokens.times[name][0] - started for name in names],
            "between": [later - earlier for earlier, later in itertools.pairwise(beside)],
        }

    def beside(self, requests: int, max_tokens: int, seed: int) -> dict[str, Any]:
        """Requests with a picture each, which come while a text is generated; the engine is in this
        process, and the stand-in for a card's compiler too.

        Returns:
            ``alone`` and ``between``: seconds between two tokens of the text, before they come and
            until the last of them ends; ``first``: seconds to the first token of each of them;
            ``busy``: share of that time in which the device computes.
        """
        import sys

        from vllm import SamplingParams

        engine, device = self.llm.llm_engine, sys.modules["torch_sendnn"]
        text = SamplingParams(temperature=0.0, max_tokens=1900, ignore_eos=True)
        engine.add_request("text", {"prompt_token_ids": [20, 21, 22]}, text)
        tokens = Tokens(engine)
        while len(tokens.times["text"]) < 30:
            tokens.step()
        alone = tokens.between("text")
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        runs, came = len(device.record.runs), {}
        names = [f"picture {seed + i}" for i in range(requests)]
        prompt = PROMPT.format(question=QUESTION)
        for i, name in enumerate(names):
            shown = {"image": picture(seed + i)}
            came[name] = time.perf_counter()
            engine.add_request(name, {"prompt": prompt, "multi_modal_data": shown}, params)
        started = time.perf_counter()
        while any(len(tokens.times[name]) < max_tokens for name in names):
            tokens.step()
        seconds = time.perf_counter() - started
        engine.abort_request(["text"])
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "alone": alone[5:],
            "between": tokens.between("text")[len(alone) :],
            "first": [tokens.times[name][0] - came[name] for name in names],
            "busy": (len(device.record.runs) - runs) * device.runtime.CALL_SECONDS / seconds,
        }

    def count(self, metric: str) -> dict[str, Any]:
        """A counter of vLLM's metrics; the engine was asked to keep them."""
        found = [each for each in self.llm.get_metrics() if each.name == metric]
        return {"value": sum(each.value for each in found)}

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of each decode step of ``batch`` sequences; the engine in this process."""
        self._add(batch, context, steps)
        total = []
        while self.llm.llm_engine.has_unfinished_requests():
            started = time.perf_counter()
            self.llm.llm_engine.step()
            if self._all_decode(batch):
                total.append(time.perf_counter() - started)
        return {"seconds": total[2:-4]}

    def host_work(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Seconds of the engine's decode steps outside the model, in turn with vLLM's own.

        A step is the engine core's: the schedule, the runner, the sampler and the bookkeeping. What
        the front end does is not counted: it has a process of its own otherwise.

        Returns:
            ``ours`` and ``reference``: seconds of each step, by part; ``total`` is the sum.
        """
        from host_work import PARTS, Reference

        core, runner = self._core, self._core_runner
        watched = {
            "step": (core, "step_fn"),
            "model": (runner.spyre_model, "forward"),
            "embed": (runner.spyre_model, "embed"),
            "schedule": (core.scheduler, "schedule"),
            "sampler": (runner, "sampler"),
            "bookkeeping": (core.scheduler, "update_from_output"),
        }
        watches = {part: Stopwatch(getattr(*place)) for part, place in watched.items()}
        for part, (owner, name) in watched.items():
            setattr(owner, name, watches[part])
        reference = Reference(core, batch, context, steps)
        ours, theirs = [], []
        self._add(batch, context, steps)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            if self._all_decode(batch):
                taken = {part: watches[part].seconds for part in PARTS}
                model = watches["model"].seconds + watches["embed"].seconds
                total = watches["step"].seconds - model
                taken["runner"] = total - sum(taken.values())
                ours.append(taken | {"total": total})
                theirs.append(reference.step())
        for part, (owner, name) in watched.items():
            setattr(owner, name, watches[part].function)
        return {"ours": ours[2:-4], "reference": theirs[2:-4]}

    def tower(self, tiles: int, repeats: int) -> dict[str, Any]:
        """Seconds of the vision tower and the projector, for a square picture of two tiles.

        Args:
            tiles: of it: two, the picture and its one tile.
            repeats: of the measurement.
        """
        import torch

        model = self._core_runner.spyre_model
        side = model.mapping.hf_config.vision_config.image_size
        pixels = torch.randn(1, tiles, 3, side, side)
        image = {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]])}
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            with torch.inference_mode():
                model.encode(image)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}

    @property
    def _core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def _core_runner(self) -> Any:
        return self._core.model_executor.driver_worker.worker.model_runner

    def _all_decode(self, batch: int) -> bool:
        """Whether all sequences decode, none of them for the first time."""
        return len(self._core_runner.decodes) == batch and not self._core.scheduler.waiting

    def _add(self, batch: int, context: int, steps: int) -> None:
        """Sequences of random tokens that decode together for more than ``steps`` steps."""
        from vllm import SamplingParams

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
