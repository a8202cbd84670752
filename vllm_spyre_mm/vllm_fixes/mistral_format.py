# SPDX-License-Identifier: Apache-2.0
"""Takes Mistral's repositories, which hold a model in two formats, for the Hugging Face one.

Such a repository has ``consolidated.safetensors``, ``params.json`` and ``tekken.json`` beside
``model*.safetensors``, ``config.json`` and ``tokenizer.json``. vLLM's ``auto`` prefers the former;
this platform reads the latter alone, and a processor of Hugging Face needs its tokenizer.

Leans on: ``EngineArgs.create_model_config`` makes the model's configuration of the fields
``config_format`` and ``tokenizer_mode``, whose ``auto`` is decided by ``is_mistral_model_repo``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FAULT = Fault(
    "vLLM reads the half of a repository that is in Mistral's format where it also has one in "
    "Hugging Face's, which alone has a processor of pictures.",
    seen_in="0.32.0",
)
REPLACED = ("vllm.engine.arg_utils.EngineArgs.create_model_config",)

OWN_TOKENIZERS = ("tekken.json", "tokenizer.model.v*")
"""Files of Mistral's own tokenizers."""


def install() -> None:
    """Extend vLLM's engine arguments as soon as they exist."""
    when_loaded("vllm.engine.arg_utils", _extend_engine_args)


def _extend_engine_args(module: ModuleType) -> None:
    require_attributes(module, ("EngineArgs",))
    arguments = module.EngineArgs
    require_attributes(arguments, ("create_model_config",))
    require_parameters(arguments.__init__, ("config_format", "tokenizer_mode", "hf_config_path"))
    if not is_extended(arguments.create_model_config, __name__):
        arguments.create_model_config = _resolving(arguments.create_model_config)


def _resolving(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    def create_model_config(self: Any) -> Any:
        resolve_formats(self)
        return original(self)

    return create_model_config


def resolve_formats(arguments: Any) -> None:
    """Replace ``auto`` by ``hf`` where a repository of Mistral's has both formats, in place.

    Args:
        arguments: vLLM's ``EngineArgs``. What they say besides ``auto`` is left as it is.
    """
    from vllm.transformers_utils.repo_utils import file_or_path_exists, is_mistral_model_repo

    def has_both(repository: str, revision: str | None, file: str) -> bool:
        return is_mistral_model_repo(repository, revision) and file_or_path_exists(
            repository, file, revision
        )

    described_by = arguments.hf_config_path or arguments.model
    if arguments.config_format == "auto" and has_both(
        described_by, arguments.revision, "config.json"
    ):
        arguments.config_format = "hf"
    tokenized_by, revision = arguments.tokenizer, arguments.tokenizer_revision
    if tokenized_by is None:
        tokenized_by, revision = arguments.model, revision or arguments.revision
    if arguments.tokenizer_mode == "auto" and has_both(tokenized_by, revision, "tokenizer.json"):
        arguments.tokenizer_mode = "hf"


def uses_own_tokenizer(model_config: "ModelConfig") -> bool:
    """Whether vLLM takes Mistral's own tokenizer for a model."""
    from vllm.transformers_utils.repo_utils import any_pattern_in_repo_files, is_mistral_model_repo

    if model_config.skip_tokenizer_init or model_config.tokenizer_mode not in ("auto", "mistral"):
        return False
    if model_config.tokenizer_mode == "mistral":
        return True
    repository, revision = model_config.tokenizer, model_config.tokenizer_revision
    return is_mistral_model_repo(repository, revision) and any_pattern_in_repo_files(
        repository, list(OWN_TOKENIZERS), revision
    )
