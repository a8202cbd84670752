# SPDX-License-Identifier: Apache-2.0
"""One process of the engine: the worker, and the runner that executes its steps."""
