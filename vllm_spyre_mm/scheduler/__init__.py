# SPDX-License-Identifier: Apache-2.0
"""The scheduler: steps, admission, the embedding budget, and the geometry of blocks and chunks."""
