# SPDX-License-Identifier: Apache-2.0
"""Requests from vLLM's scheduler through the runner to their logits, beside a plain forward pass.

The scheduler, the block manager, the prefix cache, the runner, the merge, the KV cache and the
attention are the real ones; what is left out is the engine's process and its front end. Before each
step, everything in the KV cache that no request may read is poisoned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests import architectures
from tests.checkpoints import edit_tensors
from vllm_spyre_mm.config import BackendName, CardSettings
from vllm_spyre_mm.model_executor.backends import make_backend
from vllm_spyre_mm.model_executor.card.inputs import CardInputs
from vllm_spyre_mm.model_executor.kv_cache import allocate_kv_cache
from vllm_spyre_mm.model_executor.loader import LoadOptions, load_model
from vllm_spyre_mm.model_executor.model import SpyreModel
from vllm_spyre_mm.multimodal.mm_mappings import MMUtils, get_mm_mapping
from vllm_spyre_mm.scheduler.geometry import geometry_of
from vllm_spyre_mm.scheduler.outputs import SpyreModelRunnerOutput
from vllm_spyre_mm.scheduler.scheduler import SpyreScheduler
from vllm_spyre_mm.worker.model_runner import SpyreModelRunner
from vllm_spyre_mm.worker.ranks import Ranks
from vllm_spyre_mm.worker.step_sizes import step_sizes

VOCABULARY = architectures.DECODER["vocab_size"]
HIDDEN_SIZE = architectures.DECODER["hidden_size"]
MAX_MODEL_LEN = 1536

Poison = Literal["nan", "huge"]
POISONS: dict[Poison, float] = {"nan": float("nan"), "huge": 1e30}


@dataclass(frozen=True)
class Picture:
    """An image of a prompt, given as features.

    Attributes:
        identifier: of its content; pictures of one identifier have the same features.
        offset: of its placeholder in the prompt.
        is_embed: for each position of the placeholder, whether a feature goes there.
        levels: of deepstack, beside the input's columns.
    """

    identifier: str
    offset: int
    is_embed: tuple[bool, ...]
    levels: int = 0

    @property
    def features(self) -> torch.Tensor:
        """``(num_features, hidden_size * (1 + levels))``; of its identifier and length alone."""
        seed = sum(map(ord, self.identifier)) * 1009 + len(self.is_embed)
        generator = torch.Generator().manual_seed(seed)
        width = HIDDEN_SIZE * (1 + self.levels)
        return 0.3 * torch.randn(sum(self.is_embed), width, generator=generator)

    def spec(self) -> MultiModalFeatureSpec:
        """As vLLM's front end hands it to the engine."""
        element = MultiModalFieldElem(data=self.features, field=MultiModalBatchedField())
        mask = None if all(self.is_embed) else torch.tensor(self.is_embed)
        return MultiModalFeatureSpec(
            data=MultiModalKwargsItem({"image_embeds": element}),
            modality="image",
            identifier=self.identifier,
            mm_position=PlaceholderRange(self.offset, len(self.is_embed), mask),
        )


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        token_ids: of the prompt.
        pictures: in its order.
        max_tokens: to be generated.
        arrival: the step before which it is added.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    max_tokens: int
    arrival: int = 0


@dataclass(frozen=True)
class Setup:
    """Sizes of one scenario; see ``Geometry``, ``VllmConfig`` and ``KVCacheConfig``.

    Attributes:
        poison: what lies in blocks that are nobody's.
        collects: every request gets its embedding.
    """

    block_size: int
    chunk_blocks: int
    max_num_seqs: int
    num_blocks: int
    max_batch_tkv: int
    encoder_cache: int
    poison: Poison = "nan"
    collects: bool = False

    @property
    def chunk_size(self) -> int:
        return self.block_size * self.chunk_blocks


@dataclass
class Answer:
    """What a request got.

    Attributes:
        token_ids: generated.
        logits: for each, ``(vocab_size,)``.
        hit: tokens that its first admission found in the prefix cache.
        chunks: of its prefill.
        rows: requests that decoded together with it, itself included, at most.
        embedding: ``(num_features, hidden_size)``; None without pictures, or if none is collected.
    """

    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    hit: int | None = None
    chunks: int = 0
    rows: int = 0
    embedding: torch.Tensor | None = None


class Journey:
    """One model on one backend, which serves scenario after scenario.

    Args:
        checkpoint: of :func:`save_checkpoint`.
        backend: ``eager`` and ``inductor`` differ in the attention of a decode; ``sendnn`` has the
            card's layout and FMS's own attention. Nothing is compiled by ``torch.compile``.
        mapping: of the checkpoint; None for the one that serves it.
    """

    def __init__(
        self, checkpoint: Path, backend: BackendName, mapping: MMUtils | None = None
    ) -> None:
        self.vllm_config = EngineArgs(
            model=str(checkpoint),
            max_model_len=MAX_MODEL_LEN,
            dtype="float32",
            enforce_eager=True,
            logprobs_mode="raw_logits",
            max_logprobs=-1,
            additional_config={
                "encoder_dtype": "float32",
                "max_batch_tkv": MAX_MODEL_LEN,
                "encode_ahead": False,  # there is no worker here, which does that
            },
        ).create_engine_config()
        mapping = mapping or get_mm_mapping(self.vllm_config.model_config.hf_config)
        fms_model = load_model(mapping, checkpoint, LoadOptions(torch.float32, torch.float32))
        self.backend = backend
        sizes = step_sizes(self.vllm_config)
        self.model = SpyreModel(fms_model, mapping, make_backend(backend, sizes, CardSettings()))
        self._poisoned: set[int] = set()

    def serve(self, setup: Setup, asks: Sequence[Ask]) -> list[Answer]:
        """Serve requests to their end."""
        scheduler, runner = self._start(setup)
        answers = {f"r{number}": Answer() for number in range(len(asks))}
        pending = sorted(enumerate(asks), key=lambda item: item[1].arrival)
        step = 0
        while pending or scheduler.has_unfinished_requests():
            while pending and pending[0][1].arrival <= step:
                number, ask = pending.pop(0)
                scheduler.add_request(make_request(f"r{number}", ask, setup.block_size))
            self._step(scheduler, runner, answers, POISONS[setup.poison])
            step += 1
            assert step < 5000, "no progress"
        return list(answers.values())

    def _start(self, setup: Setup) -> tuple[SpyreScheduler, SpyreModelRunner]:
        config, mapping = self.vllm_config, self.model.mapping
        config.cache_config.block_size = setup.block_size
        config.cache_config.num_gpu_blocks = setup.num_blocks
        config.scheduler_config.max_num_batched_tokens = setup.chunk_size
        config.scheduler_config.max_num_seqs = setup.max_num_seqs
        config.scheduler_config.encoder_cache_size = setup.encoder_cache
        config.scheduler_config.max_num_encoder_input_tokens = setup.encoder_cache
        config.additional_config = {
            **config.additional_config,
            "backend": self.backend,
            "max_batch_tkv": setup.max_batch_tkv,
            "enable_return_mm_embedding": setup.collects,
        }
        options = mapping.kv_cache_options()
        with self.model.backend.without_gradients():
            self.model.kv_cache = allocate_kv_cache(
                options, setup.num_blocks, setup.block_size, torch.float32, 1
            )
            for cache in self._caches():
                cache.fill_(POISONS[setup.poison])
        self._poisoned = set(range(setup.num_blocks))
        if self.backend == "sendnn":  # of chunks that the card may have no programs for
            self.model.backend.inputs = CardInputs(
                setup.block_size,
                dynamic_chunk=True,
                num_levels=mapping.load_overrides().deepstack_levels,
            )
        else:
            self.model.backend.inputs = make_backend(
                self.backend, step_sizes(config), CardSettings()
            ).inputs
        runner = SpyreModelRunner(
            config,
            self.model,
            geometry_of(config),
            return_mm_embedding=setup.collects,
            ranks=Ranks(),
        )
        return make_scheduler(config, setup), runner

    def _caches(self) -> Iterator[torch.Tensor]:
        for keys, values in self.model.kv_cache:
            yield keys
            yield values

    def _step(
        self,
        scheduler: SpyreScheduler,
        runner: SpyreModelRunner,
        answers: dict[str, Answer],
        poison: float,
    ) -> None:
        output = scheduler.schedule()
        with self.model.backend.without_gradients():
            self._poison(scheduler, poison)
        for new in output.scheduled_new_reqs:
            answer = answers[new.req_id]
            answer.hit = new.num_computed_tokens if answer.hit is None else answer.hit
        for req_id in output.num_scheduled_tokens:
            answers[req_id].chunks += not answers[req_id].token_ids
        result = runner.execute_model(output)
        if result is None:
            result = runner.sample_tokens(None)
            rows = logits_of(result.logprobs)
            for req_id, row in result.req_id_to_index.items():
                answer = answers[req_id]
                answer.logits.append(rows[row])
                answer.token_ids += result.sampled_token_ids[row]
                answer.rows = max(answer.rows, len(rows))
            if isinstance(result, SpyreModelRunnerOutput):  # of a prompt's last chunk
                for req_id, embedding in result.mm_embeddings.items():
                    assert answers[req_id].embedding is None, "handed over twice"
                    answers[req_id].embedding = embedding
        scheduler.update_from_output(output, result)

    def _poison(self, scheduler: SpyreScheduler, poison: float) -> None:
        """Block 0 and every block that is nobody's, neither a request's nor the prefix cache's."""
        nobodys = {
            block.block_id
            for block in scheduler.kv_cache_manager.block_pool.blocks
            if block.ref_cnt == 0 and block.block_hash is None
        }
        freed = [0, *(nobodys - self._poisoned)]
        self._poisoned = nobodys  # a block that is handed out again leaves the set
        for cache in self._caches():
            cache[freed] = poison


def make_scheduler(config: VllmConfig, setup: Setup) -> SpyreScheduler:
    spec = FullAttentionSpec(
        block_size=setup.block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    return SpyreScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=setup.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=setup.block_size,
        hash_block_size=setup.block_size,
    )


def make_request(name: str, ask: Ask, block_size: int) -> Request:
    """A request as the engine makes it, greedy, that returns all its logits."""
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    return Request(
        request_id=name,
        prompt_token_ids=list(ask.token_ids),
        sampling_params=SamplingParams(
            max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=True, logprobs=-1
        ),
        pooling_params=None,
        mm_features=[picture.spec() for picture in ask.pictures],
        block_hasher=get_request_block_hasher(block_size, hash_function),
    )


def logits_of(logprobs: LogprobsLists | None) -> torch.Tensor:
    """Logits ``(rows, vocab_size)`` from vLLM's sorted list of all of them."""
    assert logprobs is not None, "every request asks for them"
    rows = np.full((len(logprobs.logprobs), VOCABULARY), np.nan, dtype=np.float32)
    np.put_along_axis(rows, logprobs.logprob_token_ids, logprobs.logprobs, axis=1)
    return torch.from_numpy(rows)


class PlainModel:
    """Transformers' decoder on the whole of a sequence at once: no cache, no pages, no chunks."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.eval()

    @torch.inference_mode()
    def logits(self, ask: Ask, generated: Sequence[int]) -> torch.Tensor:
        """Logits of each generated token, ``(len(generated), vocab_size)``."""
        token_ids = torch.tensor([[*ask.token_ids, *generated[:-1]]])
        embeds = self.model.get_input_embeddings()(token_ids)
        for picture in ask.pictures:
            positions = picture.offset + torch.tensor(picture.is_embed).nonzero()[:, 0]
            embeds[0, positions] = picture.features[:, :HIDDEN_SIZE]
        hidden = self._decode(embeds, ask)
        return self.model.lm_head(hidden[0, len(ask.token_ids) - 1 :])

    def _decode(self, embeds: torch.Tensor, ask: Ask) -> torch.Tensor:
        """The decoder's last hidden states of embeddings."""
        return self.model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]


def save_checkpoint(path: Path, head_dim: int) -> Path:
    """A tiny random LLaVA-Next with Mistral's decoder, whose heads may have any width."""
    text = architectures.mistral(num_hidden_layers=2, head_dim=head_dim)
    architectures.save_checkpoint(path, architectures.llava_next(text))
    # Logits as far apart as those of a trained model: rounding grows with them.
    tensors = load_file(path / "model.safetensors")
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    edit_tensors(path, {head: tensors[head] / 4})
    return path
