# SPDX-License-Identifier: Apache-2.0
"""The platform's settings.

Users give settings through vLLM's own ``additional_config`` (a JSON object); vLLM carries it to
every process. :meth:`SpyreSettings.resolve` replaces each ``auto`` once, in the process that
creates the engine; the other processes read the resolved values back.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

BackendName = Literal["sendnn", "inductor", "eager"]

CpuTier = Literal["generic", "avx2", "avx512", "avx512_bf16", "amx"]

CPU_TIERS: tuple[CpuTier, ...] = get_args(CpuTier)
"""Instruction sets of CPUs, each including those before it; see ``model_executor.cpu.tier``."""

BLOCK_SIZE = 64
"""Tokens in a block of the KV cache; the card's compiler expects this number."""

CARD_CHUNK_SIZE = 512
"""Tokens in a prefill chunk (vLLM's ``max_num_batched_tokens``) unless the user gives it."""

HOST_CHUNK_SIZE = 1536
"""Tokens in a prefill chunk on a CPU, which reads the weights once a chunk and pads nothing."""

DEFAULT_MAX_NUM_SEQS = 16
"""Sequences decoded together (vLLM's ``max_num_seqs``) unless the user gives it."""

DEFAULT_MAX_MODEL_LEN = 8192
"""Upper bound of the ``max_model_len`` that is derived from a checkpoint: Granite says 131,072,
whose KV cache fits no development host."""

CARD_MAX_BATCH_TKV = 131072
"""Bound on rows times padded length of the card's decodes unless the user gives it, in tokens."""


NOT_FOR_USERS = ("max_num_seqs_given", "num_local_engines", "engine_memory_bytes", "resolved")
"""Settings with which the platform's parts tell each other what they have done."""


class CardSettings(BaseModel):
    """What public knowledge does not tell of the card's software, to be tried at a card.

    Attributes:
        dynamic_chunk: mark the length of a prefill chunk as a dimension that varies.
        fullgraph: a graph break is an error; off, a step may become several graphs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dynamic_chunk: bool = True
    fullgraph: bool = True


class SpyreSettings(BaseModel):
    """The platform's settings: what vLLM has no flag for.

    Attributes:
        enable_return_mm_embedding: return the merged vision features of every request on
            ``CompletionOutput.mm_embedding``. Also ``LLM(enable_return_mm_embedding=True)`` and
            ``--enable-return-mm-embedding``.
        return_mm_embedding_by_default: return it also for requests that do not ask. Off, a request
            asks with ``extra_args={"return_mm_embedding": True}``. A request over HTTP always has
            to ask.
        max_mm_embedding_response_bytes: largest embedding in an HTTP response, in bytes before
            it is encoded as text.
        max_held_mm_embedding_bytes: bound on the embeddings of the requests that run at the same
            time, in bytes. A request that would exceed it waits until others have finished; one
            that alone exceeds it is refused.
        trust_client_image_uuids: take a client's ``uuid`` of an image over HTTP for its identity in
            every cache. Off, such uuids are ignored: images are told apart by their content.
        backend: what runs the decoder. ``auto`` takes ``sendnn`` where ``torch_sendnn`` is
            importable; otherwise the CPU, compiled by ``inductor``, or ``eager`` with vLLM's
            ``--enforce-eager`` and where PyTorch lacks what compilation leans on.
        encoder_dtype: dtype of the vision encoder and of the embeddings. ``auto`` is the
            decoder's dtype on a CPU; for a card (whose decoder is fp16 while the encoder runs on
            the host) it is the host's fastest dtype.
        encoder_cache_tokens: image features kept for later requests, in feature rows. Raised to
            ``max_model_len`` where it is less, so that one request's images always fit.
            ``None``: ``max_model_len`` on a CPU; twice that for a card, beside whose prefill of one
            request the host encodes the next one's images.
        encode_ahead: encode the images of waiting requests beside the steps of running ones. Off,
            they are encoded in the step of the chunk that needs them, and everybody waits.
        max_batch_tkv: bound on batch × padded length of a decode step, in tokens. ``None``: no
            bound beyond ``max_num_seqs`` × ``max_model_len`` on a CPU, 131,072 for a card.
        missing_features: what a consumer of an EC connector does with an image of which the
            connector has no features. ``encode``: the engine encodes it. ``refuse``: its request
            fails; then the engine loads no vision encoder.
        encode_timeout_seconds: how long the process that encodes pictures beside a card may say
            nothing while it encodes; then another one takes its place. On a CPU: how long a layer
            of the encoder may take; then the engine ends.
        max_num_seqs_given: set where vLLM's arguments are read, not by users: whether the user gave
            ``max_num_seqs``, which a known configuration of a card replaces otherwise.
        card: :class:`CardSettings`; without effect on a CPU.
        num_local_engines: set at start, not by users: data-parallel engines that share this host.
        engine_memory_bytes: set at start, not by users: what each of them may take of the host's
            memory, in bytes; None where there is one.
        resolved: set by :meth:`resolve`, not by users: nothing is ``auto`` any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enable_return_mm_embedding: bool = False
    return_mm_embedding_by_default: bool = True
    max_mm_embedding_response_bytes: int = Field(default=64 << 20, gt=0)
    max_held_mm_embedding_bytes: int = Field(default=1 << 30, gt=0)
    trust_client_image_uuids: bool = False
    backend: Literal["auto", "sendnn", "inductor", "eager"] = "auto"
    encoder_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    encoder_cache_tokens: int | None = Field(default=None, gt=0)
    encode_ahead: bool = True
    max_batch_tkv: int | None = Field(default=None, gt=0)
    missing_features: Literal["encode", "refuse"] = "encode"
    encode_timeout_seconds: float = Field(default=300, gt=0)
    max_num_seqs_given: bool = True
    card: CardSettings = CardSettings()
    num_local_engines: int = Field(default=1, ge=1)
    engine_memory_bytes: int | None = None
    resolved: bool = False

    @classmethod
    def parse(cls, additional_config: object) -> "SpyreSettings":
        """Check the user's ``additional_config``.

        Raises:
            ValueError: something in it is unknown or has a wrong type; the message names it.
        """
        if not isinstance(additional_config, Mapping):
            raise ValueError(
                "additional_config must be a JSON object of Spyre settings, not "
                f"{type(additional_config).__name__}"
            )
        try:
            return cls.model_validate(dict(additional_config))
        except ValidationError as error:
            known = ", ".join(name for name in cls.model_fields if name not in NOT_FOR_USERS)
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})"
                for fault in error.errors()
            )
            raise ValueError(
                f"additional_config holds an invalid Spyre setting: {faults}. "
                f"The settings are: {known}."
            ) from None

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> "SpyreSettings":
        """The settings of a running engine, as :meth:`resolve` left them."""
        return cls.parse(vllm_config.additional_config)

    def resolve(
        self,
        *,
        enforce_eager: bool,
        decoder_dtype: str,
        host_dtypes: tuple[str, ...],
        max_model_len: int,
        max_num_seqs: int,
        can_compile: bool = True,
    ) -> "SpyreSettings":
        """Replace every ``auto`` and ``None``.

        Args:
            enforce_eager: vLLM's flag.
            decoder_dtype: name of the dtype vLLM resolved for the model.
            host_dtypes: names of the dtypes that the host computes in, fastest first.
            max_model_len: longest sequence in tokens.
            max_num_seqs: largest decode batch.
            can_compile: whether PyTorch has what compilation for the CPU leans on.

        Raises:
            ValueError: the backend is not available here, or a bound is below what one request
                needs.
        """
        backend = self.resolve_backend(enforce_eager, can_compile)
        encoder_dtype: str = self.encoder_dtype
        if encoder_dtype == "auto":
            encoder_dtype = decoder_dtype if decoder_dtype in host_dtypes else host_dtypes[0]
        if encoder_dtype not in host_dtypes:
            raise ValueError(
                f"encoder_dtype={encoder_dtype!r} is not one that this host computes in: "
                f"{', '.join(host_dtypes)}"
            )
        # A row of a decode is as long as its whole blocks.
        longest_row = -(-max_model_len // BLOCK_SIZE) * BLOCK_SIZE
        everything = max_num_seqs * longest_row
        max_batch_tkv = self.max_batch_tkv
        if max_batch_tkv is None:
            bound = max(CARD_MAX_BATCH_TKV, longest_row) if backend == "sendnn" else everything
            max_batch_tkv = min(bound, everything)
        if max_batch_tkv < longest_row:
            raise ValueError(
                f"max_batch_tkv={max_batch_tkv} is less than one row of max_model_len="
                f"{max_model_len} tokens: raise it to {longest_row} or lower --max-model-len"
            )
        encoder_cache_tokens = self.encoder_cache_tokens
        if encoder_cache_tokens is None and backend == "sendnn":
            encoder_cache_tokens = 2 * max_model_len
        return self.model_copy(
            update={
                "backend": backend,
                "encoder_dtype": encoder_dtype,
                "encoder_cache_tokens": max(encoder_cache_tokens or 0, max_model_len),
                "max_batch_tkv": max_batch_tkv,
                "resolved": True,
            }
        )

    def resolve_backend(self, enforce_eager: bool, can_compile: bool = True) -> BackendName:
        """The backend that runs the decoder, with ``auto`` replaced.

        Raises:
            ValueError: it is not available here, or contradicts ``--enforce-eager``.
        """
        if self.backend == "sendnn" and not card_backend_available():
            raise ValueError(
                "backend='sendnn' needs the package torch_sendnn, which comes with the Spyre "
                "software and is not installed here; use backend='auto' to run on the CPU"
            )
        if self.backend == "sendnn" and enforce_eager:
            raise ValueError("backend='sendnn' compiles the model: drop --enforce-eager")
        if self.backend == "inductor" and enforce_eager:
            raise ValueError("backend='inductor' and --enforce-eager contradict each other")
        if self.backend == "inductor" and not can_compile:
            raise ValueError(
                "backend='inductor' leans on parts of PyTorch that the installed release does not "
                "have: use backend='auto', or a release that docs/compatibility.md names"
            )
        if self.backend != "auto":
            return self.backend
        if enforce_eager:
            return "eager"
        if card_backend_available():
            return "sendnn"
        return "inductor" if can_compile else "eager"


def decoder_dtype_of(vllm_config: "VllmConfig") -> "torch.dtype":
    """The dtype vLLM resolved for the model: of the decoder, the text embeddings and the cache."""
    import torch

    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolves names when it makes the configuration"
    return dtype


def card_backend_available() -> bool:
    """Whether ``torch_sendnn``, the card's compiler, can be imported."""
    return importlib.util.find_spec("torch_sendnn") is not None


def settings_summary(settings: SpyreSettings, **resolved: Any) -> str:
    """One line with everything that was resolved at start."""
    values = {**settings.model_dump(exclude=set(NOT_FOR_USERS)), **resolved}
    return ", ".join(f"{name}={value}" for name, value in values.items())
