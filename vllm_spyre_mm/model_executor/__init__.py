# SPDX-License-Identifier: Apache-2.0
"""The model: its parts, its weights, the KV cache, and the backends that run it."""
