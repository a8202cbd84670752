# SPDX-License-Identifier: Apache-2.0
"""The embedding over HTTP: fields of OpenAI's API and a route of its own."""
