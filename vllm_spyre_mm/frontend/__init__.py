# SPDX-License-Identifier: Apache-2.0
"""The client's side of the engine: arguments, validation, the way of an embedding to the client."""
