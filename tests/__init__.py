# SPDX-License-Identifier: Apache-2.0
"""Tests; the layout is the package's, and ``e2e`` has those that run whole engines."""

import os

# Threads of OpenMP sleep while they wait. By default they spin, which takes the cores away from
# other processes: on two cores, two processes of tests took ten times their time. Libraries read
# it when they are loaded, so before PyTorch; processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before Transformers is imported, as the platform does it
