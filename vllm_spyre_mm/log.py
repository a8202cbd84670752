# SPDX-License-Identifier: Apache-2.0
"""Loggers that appear beside vLLM's own."""

import logging


def get_logger(name: str) -> logging.Logger:
    """A logger below vLLM's, which alone has handlers; ``name`` is the module's ``__name__``."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")
