# SPDX-License-Identifier: Apache-2.0
"""Images: architecture mappings, features, merging, the encoder cache, returned embeddings."""
