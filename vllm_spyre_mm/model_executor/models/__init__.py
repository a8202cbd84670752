# SPDX-License-Identifier: Apache-2.0
"""Models in FMS's style: vision towers, decoders, and their compositions."""
