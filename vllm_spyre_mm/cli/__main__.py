# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_spyre_mm.cli``: the command where its script is not on the path."""

import sys

from vllm_spyre_mm.cli import main

if __name__ == "__main__":
    sys.exit(main())
