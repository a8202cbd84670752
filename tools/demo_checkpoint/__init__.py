# SPDX-License-Identifier: Apache-2.0
"""Parts of ``tools/train_demo_checkpoint.py``: how the embedded demo checkpoint is made."""

from vllm_spyre_mm.compat import ensure_torchvision_importable

ensure_torchvision_importable()  # before one of them imports Transformers
