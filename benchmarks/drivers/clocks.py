# SPDX-License-Identifier: Apache-2.0
"""What times an engine's steps from within."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Tokens:
    """Steps an engine and notes when each request got its tokens.

    Attributes:
        times: of each token, by request.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.times: dict[str, list[float]] = defaultdict(list)

    def step(self) -> None:
        """One step of the engine."""
        outputs, now = self._engine.step(), time.perf_counter()
        for output in outputs:
            times = self.times[output.request_id]
            times += [now] * (len(output.outputs[0].token_ids) - len(times))

    def between(self, name: str) -> list[float]:
        """Seconds between the tokens of a request."""
        return [later - earlier for earlier, later in itertools.pairwise(self.times[name])]


class Stopwatch:
    """Calls a function and keeps how long it took.

    Attributes:
        function: that is called.
        seconds: of the last call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds = time.perf_counter() - started
        return result
