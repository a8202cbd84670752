# SPDX-License-Identifier: Apache-2.0
"""How it is said what becomes of each field of vLLM's configuration."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Allowed = Callable[[Any, "VllmConfig"], bool]


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that may not have every value.

    Attributes:
        field: its name, or that of a property.
        what: names what is not supported, with the flag where the name does not say it; ``{value}``
            stands for the value.
        allowed: whether a value, in its configuration, is one that is honoured.
    """

    field: str
    what: str
    allowed: Allowed


@dataclass(frozen=True, slots=True)
class Decisions:
    """What becomes of each field of one class of vLLM's configuration.

    Attributes:
        path: attribute of ``VllmConfig`` with the object, dotted; empty for itself.
        refused: fields with values that stop the start.
        honoured: fields that work as vLLM says.
        without_effect: fields of which nothing can come here, by the reason.
        derived: fields that no user sets: vLLM or the platform computes them.
    """

    path: str
    refused: tuple[Refused, ...]
    honoured: tuple[str, ...]
    without_effect: Mapping[str, tuple[str, ...]]
    derived: tuple[str, ...] = ()

    def of(self, vllm_config: "VllmConfig") -> Any:
        """The object that these are about; None where the model has none."""
        config: Any = vllm_config
        for name in self.path.split(".") if self.path else ():
            config = getattr(config, name)
        return config

    def fields(self) -> Iterator[str]:
        """The fields that are decided, each refused one once."""
        yield from dict.fromkeys(refused.field for refused in self.refused)
        yield from self.honoured
        for names in self.without_effect.values():
            yield from names
        yield from self.derived


def only(*values: Any) -> Allowed:
    """These values and no others."""
    return lambda value, _: value in values


def unset(value: Any, _: "VllmConfig") -> bool:
    """Nothing, whatever vLLM's way is of saying so."""
    return not value


def words(text: str) -> tuple[str, ...]:
    """Names that are separated by spaces."""
    return tuple(text.split())
