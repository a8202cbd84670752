# SPDX-License-Identifier: Apache-2.0
"""Adds ``enable_return_mm_embedding`` to vLLM's engine arguments, and the platform's defaults.

Leans on: ``EngineArgs`` and ``AsyncEngineArgs`` are dataclasses whose generated ``__init__``
refuses unknown keywords; ``from_cli_args`` hands the value of each of their fields from the command
line to ``__init__``; both keep a dict ``additional_config``, which vLLM carries to every process.
"""

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from vllm_spyre_mm.config import (
    CARD_CHUNK_SIZE,
    DEFAULT_MAX_NUM_SEQS,
    HOST_CHUNK_SIZE,
    SpyreSettings,
    card_backend_available,
)
from vllm_spyre_mm.frontend.encoder_transfer import encodes_alone
from vllm_spyre_mm.upstream.contract import require, require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

KEYWORD = "enable_return_mm_embedding"

REPLACED = (
    "vllm.engine.arg_utils.EngineArgs.__init__",
    "vllm.engine.arg_utils.AsyncEngineArgs.__init__",
)
"""Attributes of vLLM's that are replaced."""


@dataclass
class KeywordArgs:
    """The field that vLLM's argument classes get.

    Attributes:
        enable_return_mm_embedding: return the embedding of requests with images; None says nothing.
    """

    enable_return_mm_embedding: bool | None = None


class DeviceFlag(argparse.Action):
    """``--device spyre``; refuses any other device with a sentence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values not in ("spyre", "auto"):
            parser.error(
                f"--device {values}: vllm-spyre-mm makes Spyre the platform of this environment, "
                "and its only device is 'spyre' (which runs on the CPU where there is no card). "
                "To run vLLM without it, set VLLM_PLUGINS to an empty value."
            )
        setattr(namespace, self.dest, values)


def install_engine_args_hooks() -> None:
    """Extend vLLM's argument classes as soon as they exist."""
    when_loaded("vllm.engine.arg_utils", _extend_engine_args)


def _extend_engine_args(module: ModuleType) -> None:
    require_attributes(module, ("EngineArgs", "AsyncEngineArgs"))
    require_parameters(
        module.EngineArgs.__init__,
        (
            *("additional_config", "dtype", "enforce_eager", "max_num_batched_tokens"),
            *("max_num_seqs", "mm_encoder_only", "ec_transfer_config"),
        ),
    )
    require(
        KEYWORD not in inspect.signature(module.EngineArgs.__init__).parameters,
        f"EngineArgs has a parameter {KEYWORD!r} of its own",
    )
    for cls in (module.EngineArgs, module.AsyncEngineArgs):
        require_attributes(cls, ("__dataclass_fields__", "from_cli_args"))
        if not is_extended(cls.__init__, __name__):
            cls.__init__ = _accepting_keyword(cls.__init__)
            # The command line's value then comes as the keyword, and copies are made with it.
            cls.__dataclass_fields__ |= KeywordArgs.__dataclass_fields__


def _accepting_keyword(original: Callable[..., None]) -> Callable[..., None]:
    @extending(original, __name__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        wanted = kwargs.pop(KEYWORD, None)
        original(self, *args, **kwargs)
        setattr(self, KEYWORD, wanted)
        if wanted is not None:
            self.additional_config = _with_keyword(self.additional_config, wanted)
        for_card = not encodes_alone(self) and _is_for_card(
            self.additional_config, self.enforce_eager
        )
        if self.max_num_batched_tokens is None:
            self.max_num_batched_tokens = CARD_CHUNK_SIZE if for_card else HOST_CHUNK_SIZE
        if self.max_num_seqs is None:
            self.max_num_seqs = DEFAULT_MAX_NUM_SEQS
            if for_card:  # a known configuration may have another
                self.additional_config = {**self.additional_config, "max_num_seqs_given": False}
        if self.dtype == "auto" and card_backend_available() and not for_card:
            self.dtype = _host_dtype()

    return __init__


def _is_for_card(additional_config: Any, enforce_eager: bool) -> bool:
    """Whether there is a card, and these arguments let it run the decoder."""
    if not card_backend_available():
        return False
    return SpyreSettings.parse(additional_config).resolve_backend(enforce_eager) == "sendnn"


def _host_dtype() -> torch.dtype:
    """What ``auto`` is for a backend on the CPU where there is a card.

    vLLM asks the platform what it computes in before it knows the backend, and is told of the
    card's dtype alone.
    """
    from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

    return host_dtypes()[0]


def _with_keyword(additional_config: Any, wanted: Any) -> dict[str, Any]:
    """``additional_config`` with the keyword in it.

    Raises:
        ValueError: ``additional_config`` says the contrary.
    """
    settings = dict(additional_config) if isinstance(additional_config, Mapping) else {}
    if settings.get(KEYWORD, wanted) != wanted:
        raise ValueError(
            f"{KEYWORD}={wanted!r} contradicts additional_config={{{KEYWORD!r}: "
            f"{settings[KEYWORD]!r}}}: give one of them"
        )
    return {**settings, KEYWORD: wanted}
