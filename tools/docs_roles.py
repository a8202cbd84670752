# SPDX-License-Identifier: Apache-2.0
"""Extension of griffe, which reads docstrings for the site: a role becomes what it names."""

import re
from typing import Any

from griffe import Extension

ROLE = re.compile(r":\w+:`~?\.?(?P<name>[^`]+)`")


class Roles(Extension):
    """Turns ``:class:`Name``` into ``Name`` in code."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\g<name>`", obj.docstring.value)
