# SPDX-License-Identifier: Apache-2.0
"""Tests; the layout is the package's, and ``e2e`` has those that run whole engines."""

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before Transformers is imported, as the platform does it
