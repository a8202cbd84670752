# SPDX-License-Identifier: Apache-2.0
"""What a model is: loading and checking weights, the attention op, compilation, the KV cache."""
