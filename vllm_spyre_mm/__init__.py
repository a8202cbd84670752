# SPDX-License-Identifier: Apache-2.0
"""vLLM platform plugin for vision-language models on IBM Spyre.

This module holds vLLM's entry points. It is imported in every process that uses vLLM, so it must
stay cheap, and free of side effects but for one variable that PyTorch reads when it is imported.
"""

from vllm_spyre_mm.environment import keep_device_extensions_unloaded, warn_of_other_spyre_plugin

PLATFORM_CLASS = "vllm_spyre_mm.platform.SpyrePlatform"

keep_device_extensions_unloaded()


def register() -> str:
    """Entry point of the group ``vllm.platform_plugins``.

    Returns:
        The qualified name of the platform class. vLLM swallows whatever this function raises, so
        everything that may fail happens when that class is imported.
    """
    warn_of_other_spyre_plugin()
    return PLATFORM_CLASS


def register_hooks() -> None:
    """Entry point of the group ``vllm.general_plugins``: adds the embedding to vLLM's outputs.

    Raises:
        UnsupportedVllmError: vLLM's classes are not what the hooks expect.
    """
    from vllm.platforms import current_platform

    cls = type(current_platform)
    if f"{cls.__module__}.{cls.__qualname__}" != PLATFORM_CLASS:
        return  # the platform was opted out of with VLLM_PLUGINS: leave vLLM as it is
    from vllm_spyre_mm.frontend.hooks import install

    install()
