# SPDX-License-Identifier: Apache-2.0
"""What runs on the host: attention, linear layers, graph passes, memory."""
