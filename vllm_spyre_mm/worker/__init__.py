# SPDX-License-Identifier: Apache-2.0
"""The worker, one process for each rank, and the model runner that executes its steps."""
