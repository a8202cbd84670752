# SPDX-License-Identifier: Apache-2.0
"""The embedding is on the output that finishes a request, in every mode, and nowhere else."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.e2e.asks import parity_asks
from tests.e2e.engines import Ask, engine, greedy, relative_error
from tests.reference import Reference
from vllm_spyre_mm.demo import pictures
from vllm_spyre_mm.model_executor.pieces import Pieces
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler
from vllm_spyre_mm.worker import model_runner
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner

T = TypeVar("T")


def ask(seed: int, num_images: int = 1, question: str = "What is in the picture?") -> Ask:
    """A question about drawn pictures that no other seed has."""
    rng = random.Random(f"embeddings-{seed}")
    drawn = [
        pictures.draw_picture(pictures.random_shapes(rng, 2), (100 + seed, 90), rng=rng)
        for _ in range(num_images)
    ]
    return Ask(question, tuple(picture.image for picture in drawn))


def runner_of(llm: LLM) -> SpyreModelRunner:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def scheduler_of(llm: LLM) -> SpyreScheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


class TestAsyncLLM:
    """An engine in a process of its own, as ``vllm serve`` uses it."""

    @pytest.fixture(scope="class")
    def run(self) -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
        loop = asyncio.new_event_loop()
        yield loop.run_until_complete
        loop.close()

    @pytest.fixture(scope="class")
    def llm(self, run: Callable[..., Any], demo_checkpoint: Path) -> Iterator[AsyncLLM]:
        arguments = AsyncEngineArgs(
            model=str(demo_checkpoint),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=128,
            enable_return_mm_embedding=True,
            kv_cache_memory_bytes=128 << 20,
        )

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(arguments)

        async def stop(llm: AsyncLLM) -> None:
            # On its running loop: vLLM leaves the closing of its sockets to the loop, and a
            # context whose sockets stay open blocks whoever collects it.
            llm.shutdown()
            await asyncio.sleep(0)  # what shutdown cancelled ends here

        llm = run(start())
        yield llm
        run(stop(llm))

    @staticmethod
    async def stream(
        llm: AsyncLLM, asked: Ask, name: str, **parameters: Any
    ) -> list[RequestOutput]:
        parameters = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **parameters}
        return [
            output
            async for output in llm.generate(asked.prompt, SamplingParams(**parameters), name)
        ]

    @pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
    def test_streaming(
        self,
        run: Callable[..., Any],
        llm: AsyncLLM,
        demo_reference: Reference,
        kind: RequestOutputKind,
    ) -> None:
        asked = ask(1, num_images=2)
        outputs = run(self.stream(llm, asked, f"stream-{kind.name}", output_kind=kind))
        completions = [output.outputs[0] for output in outputs]
        if kind != RequestOutputKind.FINAL_ONLY:
            assert len(completions) > 1
        for completion in completions:
            assert (completion.mm_embedding is not None) == (completion.finish_reason is not None)
        features = demo_reference.features(asked.text, list(asked.images))
        embedding = completions[-1].mm_embedding
        assert relative_error(embedding, features) < 1e-4
        assert embedding.device.type == "cpu"
        assert embedding.is_contiguous()
        assert f"mm_embedding=Tensor({tuple(features.shape)}, torch.float32)" in repr(
            completions[-1]
        )

    def test_deltas_that_were_merged_while_waiting(
        self, run: Callable[..., Any], llm: AsyncLLM
    ) -> None:
        """A slow reader gets several deltas as one; vLLM merges them field by field."""

        async def slowly() -> list[RequestOutput]:
            parameters = SamplingParams(
                temperature=0.0,
                max_tokens=24,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            outputs = []
            async for output in llm.generate(ask(2).prompt, parameters, "slow"):
                outputs.append(output)
                await asyncio.sleep(0.2)  # lets outputs pile up; nothing is asserted about time
            return outputs

        outputs = run(slowly())
        assert len(outputs) < 24, "nothing was merged: the test proves nothing"
        assert outputs[-1].outputs[0].mm_embedding is not None

    def test_a_stop_string_found_by_the_front_end(
        self, run: Callable[..., Any], llm: AsyncLLM
    ) -> None:
        """The front end ends the request; the engine's own last output never comes."""
        asked = ask(3)
        plain = run(self.stream(llm, asked, "plain", max_tokens=4))[-1].outputs[0]
        stop = plain.text[1:3] or plain.text[:1]
        stopped = run(self.stream(llm, asked, "stopped", max_tokens=20, stop=[stop]))[-1].outputs[0]
        assert stopped.finish_reason == "stop"
        assert stopped.stop_reason == stop
        assert torch.equal(stopped.mm_embedding, plain.mm_embedding)

    def test_several_answers(self, run: Callable[..., Any], llm: AsyncLLM) -> None:
        output = run(
            self.stream(
                llm,
                ask(4),
                "n",
                n=3,
                temperature=1.5,
                seed=1,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        )[-1]
        assert len(output.outputs) == 3
        first = output.outputs[0].mm_embedding
        assert all(torch.equal(each.mm_embedding, first) for each in output.outputs)

    def test_text_has_none_beside_pictures(self, run: Callable[..., Any], llm: AsyncLLM) -> None:
        async def together() -> list[list[RequestOutput]]:
            asks = [Ask("How many pictures are there?"), ask(5), Ask("Which colours do you know?")]
            return await asyncio.gather(
                *(self.stream(llm, each, f"mix-{i}") for i, each in enumerate(asks))
            )

        text, picture, other = run(together())
        assert text[-1].outputs[0].mm_embedding is None
        assert picture[-1].outputs[0].mm_embedding is not None
        assert other[-1].outputs[0].mm_embedding is None

    def test_an_abort_in_the_middle_leaves_the_engine_working(
        self, run: Callable[..., Any], llm: AsyncLLM
    ) -> None:
        async def abandon() -> None:
            parameters = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
            outputs = llm.generate(ask(6, num_images=3).prompt, parameters, "abandoned")
            async for _ in outputs:
                break
            await outputs.aclose()  # not whenever the garbage collector comes to it

        run(abandon())
        assert run(self.stream(llm, ask(7), "after"))[-1].outputs[0].mm_embedding is not None


class TestCaches:
    """What is encoded when; an engine in this process, whose encoder calls are counted."""

    @pytest.fixture(scope="class")
    def llm(self, demo_checkpoint: Path) -> Iterator[LLM]:
        with engine(demo_checkpoint, max_model_len=1024, max_num_batched_tokens=128) as llm:
            yield llm

    @pytest.fixture
    def encoded(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Number of images in each encoder run."""
        runs: list[int] = []
        model = runner_of(llm).spyre_model
        original = model.encode_pieces

        def counting(mm_kwargs: Any) -> Pieces[list[torch.Tensor]]:
            features = yield from original(mm_kwargs)
            runs.append(len(features))
            return features

        monkeypatch.setattr(model, "encode_pieces", counting)
        return runs

    @staticmethod
    def embedding(llm: LLM, asked: Ask) -> torch.Tensor:
        output = llm.generate([asked.prompt], greedy(4), use_tqdm=False)[0]
        return output.outputs[0].mm_embedding

    def test_the_same_picture_again_is_not_encoded(self, llm: LLM, encoded: list[int]) -> None:
        first = self.embedding(llm, ask(20))
        assert sum(encoded) == 1
        again = self.embedding(llm, ask(20))
        other = self.embedding(llm, Ask("How many shapes are in the picture?", ask(20).images))
        assert sum(encoded) == 1
        assert torch.equal(first, again)
        assert torch.equal(first, other)

    def test_a_full_prefix_hit_with_evicted_features_encodes_once(
        self, llm: LLM, encoded: list[int]
    ) -> None:
        first = self.embedding(llm, ask(21, num_images=2))
        runner_of(llm).reset_encoder_cache()
        scheduler_of(llm).encoder_cache_manager.reset()
        encoded.clear()
        output = llm.generate([ask(21, num_images=2).prompt], greedy(4), use_tqdm=False)[0]
        assert output.num_cached_tokens > 100
        assert sum(encoded) == 2
        assert torch.equal(output.outputs[0].mm_embedding, first)

    def test_features_evicted_by_other_pictures_are_encoded_again(
        self, llm: LLM, encoded: list[int]
    ) -> None:
        first = self.embedding(llm, ask(22, num_images=3))
        for seed in range(23, 27):
            self.embedding(llm, ask(seed, num_images=3))
        cache = runner_of(llm).encoder_cache
        books = scheduler_of(llm).encoder_cache_manager
        assert len(cache) == len(books.cached) + len(books.freed)
        encoded.clear()
        assert torch.equal(self.embedding(llm, ask(22, num_images=3)), first)
        assert sum(encoded) == 3

    def test_repeated_pictures_in_one_prompt(
        self, llm: LLM, encoded: list[int], demo_reference: Reference
    ) -> None:
        (picture,) = ask(28).images
        asked = Ask("How many pictures are there?", (picture, picture))
        features = demo_reference.features(asked.text, list(asked.images))
        assert relative_error(self.embedding(llm, asked), features) < 1e-4
        assert sum(encoded) == 1

    def test_nothing_is_held_when_nothing_runs(self, llm: LLM) -> None:
        self.embedding(llm, ask(29))
        llm.llm_engine.step()
        runner = runner_of(llm)
        assert len(runner.requests) == 0
        assert len(runner.decodes) == 0
        assert len(runner.prefilled) == 0
        assert not scheduler_of(llm).encoder_cache_manager.request_cached_ids

    def test_an_abort_between_chunks_frees_the_collected_features(self, llm: LLM) -> None:
        llm.llm_engine.add_request("gone", ask(30, num_images=3).prompt, greedy(4))
        for _ in range(3):
            llm.llm_engine.step()
        (state,) = (runner_of(llm).requests[name] for name in scheduler_of(llm).requests)
        assert state.mm_parts
        assert not state.prefilled
        llm.llm_engine.abort_request(["gone"])
        llm.llm_engine.step()
        self.embedding(llm, ask(31))
        llm.llm_engine.step()
        assert len(runner_of(llm).requests) == 0


def test_off_collects_nothing(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_runner, "assemble", lambda *_: pytest.fail("collected although it is off")
    )
    with engine(demo_checkpoint, enable_return_mm_embedding=False) as llm:
        output = llm.generate([ask(40).prompt], greedy(4), use_tqdm=False)[0]
        assert output.outputs[0].mm_embedding is None


def test_additional_config_turns_it_on(demo_checkpoint: Path) -> None:
    with engine(
        demo_checkpoint,
        enable_return_mm_embedding=None,
        additional_config={"enable_return_mm_embedding": True},
    ) as llm:
        output = llm.generate([ask(41).prompt], greedy(4), use_tqdm=False)[0]
        assert output.outputs[0].mm_embedding is not None


def test_preempted_requests_keep_their_embedding_and_their_answer(demo_checkpoint: Path) -> None:
    """Too few blocks for all: requests lose their cache in the middle and start again."""
    asks = [each for each in parity_asks(12, seed=3) if each.images]
    arguments: dict[str, Any] = {"max_model_len": 1024, "max_num_batched_tokens": 128}
    parameters = greedy(150, ignore_eos=True)
    prompts = [each.prompt for each in asks]
    with engine(demo_checkpoint, **arguments) as llm:
        expected = llm.generate(prompts, parameters, use_tqdm=False)
    with engine(demo_checkpoint, num_gpu_blocks_override=24, **arguments) as llm:
        preemptions: list[str] = []
        scheduler = scheduler_of(llm)
        original = scheduler._preempt_request

        def counting(request: Any, *args: Any, **kwargs: Any) -> None:
            preemptions.append(request.request_id)
            original(request, *args, **kwargs)

        scheduler._preempt_request = counting
        found = llm.generate(prompts, parameters, use_tqdm=False)
        assert preemptions, "nothing was preempted: the scenario proves nothing"
    for output, wanted in zip(found, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert torch.equal(output.outputs[0].mm_embedding, wanted.outputs[0].mm_embedding)


def test_poisoned_padding_changes_nothing(demo_checkpoint: Path, demo_reference: Reference) -> None:
    """NaN in block 0 and in every block that nobody uses. (Without a card there is no padding to
    compute; the card's is poisoned in ``test_card_contract``.)"""
    asks = parity_asks(9, seed=4)
    with engine(demo_checkpoint, max_num_batched_tokens=128, enable_prefix_caching=False) as llm:
        with torch.inference_mode():
            for caches in runner_of(llm).spyre_model.kv_cache:
                for cache in caches:
                    cache.fill_(float("nan"))
        outputs = llm.generate([each.prompt for each in asks], greedy(12), use_tqdm=False)
    for each, output in zip(asks, outputs, strict=True):
        expected = demo_reference.generate(each.text, list(each.images), 12)
        assert list(output.outputs[0].token_ids) == expected
