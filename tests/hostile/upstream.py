# SPDX-License-Identifier: Apache-2.0
"""What vLLM itself answers with HTTP 500; listed in docs/reliability.md."""

from collections.abc import Iterator

from tests.hostile.case import COMPLETIONS, Case, completion


def upstream_cases() -> Iterator[Case]:
    """Three endpoints fail at bodies that they do not expect."""
    for value in (True, 5, "x", ["x"]):
        body = completion("Hi", structured_outputs=value)
        yield Case(f"structured_outputs={value!r}", COMPLETIONS, body)
    yield Case("deep JSON to invoke", "/invocations", b"[" * 100_000)
    for body in ([], {"new_data_parallel_size": 2}):
        yield Case(f"scaling by {body}", "/scale_elastic_ep", body)
