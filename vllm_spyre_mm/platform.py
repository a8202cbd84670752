# SPDX-License-Identifier: Apache-2.0
"""The vLLM platform: thin hooks that say what runs where, and refuse what does not run at all.

vLLM imports this module while ``vllm.config`` is half loaded, in every process; nothing that
needs a finished vLLM may be imported at the top.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_spyre_mm.compat import ensure_torchvision_importable
from vllm_spyre_mm.config import DEFAULT_MAX_MODEL_LEN, card_backend_available
from vllm_spyre_mm.environment import engine_runs_in_own_process, prepare_process_environment
from vllm_spyre_mm.frontend.engine_args import DeviceFlag, install_engine_args_hooks
from vllm_spyre_mm.frontend.main_guard import check_main_guard
from vllm_spyre_mm.host_memory import host_memory
from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.upstream.contract import check_versions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.inputs import EngineInput
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = get_logger(__name__)

check_versions()  # before anything leans on another version's internals
prepare_process_environment()
ensure_torchvision_importable()
install_engine_args_hooks()


class SpyrePlatform(Platform):
    """Vision-language models on IBM Spyre, and on a CPU where there is no card."""

    _enum = PlatformEnum.OOT
    # Tensors that vLLM handles live on the host; the card is reached through torch.compile. (vLLM
    # makes torch devices of both names.)
    device_name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    # Ray counts by its own names alone: a rank of a model takes one "GPU" of its node, card or not.
    ray_device_key = "GPU"
    # vLLM compiles some of its sampling helpers with this: on the host that would be a compile
    # at the first request that uses them.
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """dtypes of the decoder, the default first."""
        if card_backend_available():
            return [torch.float16]  # host dtypes on request: --dtype with a CPU backend
        from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

        return list(host_dtypes())

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's native kernels are not built for this platform."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "spyre"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Memory of the host in bytes, or a container's limit."""
        return host_memory().total

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def inference_mode(cls) -> Any:
        """Beside a card ``no_grad``: its compiler takes no tensor of ``inference_mode``."""
        return torch.no_grad() if card_backend_available() else torch.inference_mode()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one device: the host."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """``torch.manual_seed`` covers the host."""

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Raises ValueError: quantised checkpoints are not served yet."""
        raise ValueError(
            f"quantised checkpoints ({quant}) are not supported on Spyre yet: use one with "
            "bfloat16, float16 or float32 weights"
        )

    @classmethod
    def check_max_model_len(cls, max_model_len: int) -> int:
        """Bound a length that was derived from a checkpoint; one that the user gives is kept."""
        if max_model_len > DEFAULT_MAX_MODEL_LEN:
            logger.warning(
                "the checkpoint allows %d tokens; using max_model_len=%d so that the KV cache "
                "fits a development host (--max-model-len overrides this)",
                max_model_len,
                DEFAULT_MAX_MODEL_LEN,
            )
        return min(max_model_len, DEFAULT_MAX_MODEL_LEN)

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        """Add the platform's flags to vLLM's command line.

        vLLM calls this without a parser when an engine is about to be configured.
        """
        if parser is None:
            if engine_runs_in_own_process():
                check_main_guard()
            return
        group = parser.add_argument_group("Spyre", "Flags of the vllm-spyre-mm platform.")
        group.add_argument(
            "--device",
            action=DeviceFlag,
            default="spyre",
            help="The device to run on; this platform has one, 'spyre'.",
        )
        group.add_argument(
            "--enable-return-mm-embedding",
            action="store_true",
            default=None,  # says nothing
            help="Return the vision features of each request as mm_embedding.",
        )

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuse what the platform cannot do and resolve everything else.

        Raises:
            ValueError: with a sentence that says what is not supported and what to do.
            UnsupportedVllmError: one of vLLM's classes is not as the hooks expect.
        """
        from vllm_spyre_mm.frontend.engine_config import check_and_resolve
        from vllm_spyre_mm.frontend.hooks import install
        from vllm_spyre_mm.model_executor.cpu.tier import host_dtypes

        # vLLM loads its plugins once, and goes on without one whose failure somebody caught.
        install()
        check_and_resolve(vllm_config, host_dtypes())
        model_config = vllm_config.model_config
        if model_config is not None and model_config.supports_multimodal_inputs:
            from vllm_spyre_mm.frontend.processor_registration import register_image_processor

            register_image_processor(model_config)

    @classmethod
    def validate_request(
        cls, processed_inputs: "EngineInput", params: "SamplingParams | PoolingParams"
    ) -> None:
        """Refuse a request that asks for what the platform cannot do (HTTP 400)."""
        from vllm_spyre_mm.frontend.request_validation import validate_params

        validate_params(params)
