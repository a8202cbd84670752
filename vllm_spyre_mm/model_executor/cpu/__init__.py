# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: attention, linear layers, graph passes, memory, kernels."""
