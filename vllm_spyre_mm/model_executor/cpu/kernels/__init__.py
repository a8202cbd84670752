# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU, a Python module each, and their registry."""
