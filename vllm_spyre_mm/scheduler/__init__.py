# SPDX-License-Identifier: Apache-2.0
"""Which step comes next, who is admitted when, and the arithmetic of blocks and chunks."""
