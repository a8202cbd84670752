# SPDX-License-Identifier: Apache-2.0
"""Measures the CPU path beside its references; `python -m benchmarks --help`."""
