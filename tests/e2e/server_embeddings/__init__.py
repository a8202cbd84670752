# SPDX-License-Identifier: Apache-2.0
"""The embedding over HTTP, with a real server and the ``openai`` client."""
