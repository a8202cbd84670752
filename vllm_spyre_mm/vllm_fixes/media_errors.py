# SPDX-License-Identifier: Apache-2.0
"""Turns what libraries raise for a client's media into the client's error.

Leans on: a ValueError is answered with HTTP 400, a VLLMUnprocessableEntityError with 422.
"""

import contextlib
from collections.abc import Iterator

from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError


@contextlib.contextmanager
def bytes_error(what: str) -> Iterator[None]:
    """Raises as ValueError what a decoder says of a client's bytes.

    Nothing else is worked on inside, and there is no end to what decoders raise for damaged bytes:
    RuntimeError, TypeError, AttributeError...
    """
    try:
        yield
    except (ValueError, VLLMError, MemoryError):
        raise  # a sentence already; what no picture is to blame for
    except Exception as error:
        raise ValueError(f"Failed to load {what}: {error}") from error


@contextlib.contextmanager
def clients_error(parameter: str) -> Iterator[None]:
    """Raises what went wrong with a URL as the client's error (HTTP 422), if it is not one yet.

    Args:
        parameter: the field of the request that has the URL.
    """
    try:
        yield
    except (ValueError, VLLMError, MemoryError):
        raise
    except Exception as error:
        raise VLLMUnprocessableEntityError(
            f"the media at this URL cannot be used: {error or type(error).__name__}",
            parameter=parameter,
        ) from error
