# SPDX-License-Identifier: Apache-2.0
"""Makes torchvision importable in a driver's process that has no platform to do it."""

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()
