# SPDX-License-Identifier: Apache-2.0
"""Checks an installation, and a model if one is given; each finding says what to do.

A check that fails in an unforeseen way is a finding too. Checks that may crash the process (native
libraries, vLLM with the hooks) run in a process of their own (:mod:`.probe`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_spyre_mm.doctor.finding import Finding

if TYPE_CHECKING:
    from vllm_spyre_mm.doctor.card import CardHost

__all__ = ["Finding", "examine"]

Check = tuple[str, Callable[[], Iterator[Finding]]]
"""A check's name, and the function that yields its findings."""


def examine(
    model: Path | None = None, card_host: "CardHost | None" = None, *, dummy_weights: bool = False
) -> Iterator[Finding]:
    """Run every check: first the installation, then a card's host, then the model.

    Args:
        model: folder of a checkpoint.
        card_host: what is looked at for a card, instead of this process's. The checks of a card
            run where anything of its software is found.
        dummy_weights: the model's weights are made up (``--load-format dummy``).

    Yields:
        At least one finding of each check, as soon as it is known.
    """
    from vllm_spyre_mm.doctor import card, host, installation
    from vllm_spyre_mm.doctor import model as of_model

    card_host = card_host or card.CardHost.here()
    of_installation: list[Check] = [
        ("python", installation.python),
        ("versions", installation.versions),
        ("plugin", installation.plugin),
        ("torchvision", installation.torchvision),
        ("hooks", installation.hooks),
        ("backend", host.backend),
        ("compiler", host.compiler),
        ("cpu", host.cpu),
        ("threads", host.threads),
        ("memory", host.memory),
    ]
    for name, check in of_installation:
        yield from _guarded(name, check)
    if card_host.has_traces:
        yield from examine_card(card_host)
    if model is None:
        return
    findings = list(_guarded("model", partial(of_model.configuration, model)))
    yield from findings
    if model.is_dir() and not dummy_weights:
        yield from _guarded("files", partial(of_model.files, model))
    if any(finding.level == "error" for finding in findings):
        return  # what it needs is not known
    yield from _guarded("processor", partial(of_model.processor, model))
    yield from _guarded("weights", partial(of_model.weights, model, dummy=dummy_weights))


def examine_card(host: "CardHost") -> Iterator[Finding]:
    """Run the checks of a host with a card; yields at least one finding of each."""
    from vllm_spyre_mm.doctor import card, card_variables

    checks: list[Check] = [
        ("torch_sendnn", partial(card.software, host)),
        ("mode", partial(card.mode, host)),
        ("devices", partial(card.devices, host)),
        ("senlib", partial(card.senlib, host)),
        ("shm", partial(card.shared_memory, host)),
        ("variables", partial(card_variables.variables, host)),
    ]
    for name, check in checks:
        yield from _guarded(name, check)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken installation breaks anywhere, and that is the finding
        yield Finding(
            name,
            "error",
            f"this could not be checked: {type(error).__name__}: {error}",
            "correct the findings above first; if there are none, report this one",
        )
