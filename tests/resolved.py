# SPDX-License-Identifier: Apache-2.0
"""Settings as they are once an engine is known."""

from typing import Any

from vllm_spyre_mm.config import SpyreSettings

WITH_BF16 = ("bfloat16", "float32")
WITHOUT_BF16 = ("float32",)


def resolve(settings: SpyreSettings | None = None, **changes: Any) -> SpyreSettings:
    arguments = {
        "enforce_eager": False,
        "decoder_dtype": "bfloat16",
        "host_dtypes": WITH_BF16,
        "max_model_len": 1000,
        "max_num_seqs": 4,
        **changes,
    }
    return (settings or SpyreSettings()).resolve(**arguments)
