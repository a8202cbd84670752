# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU, each with a Python wrapper, and their registry."""
