# SPDX-License-Identifier: Apache-2.0
"""What an image is: architecture mappings, features, merging, and the cache of encoded images."""
