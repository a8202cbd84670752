# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-spyre-mm``: one module of this package for each subcommand.

A command's module has ``SUMMARY`` (one line of help), ``add_arguments(parser)`` and
``run(arguments) -> int``, the exit status. All of them are imported to print the help, so they
import vLLM and PyTorch inside their functions.
"""

import argparse
import importlib
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS: tuple[str, ...] = ("embed", "show", "models", "doctor")
"""Names of the modules here that are subcommands, in the order of the help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line, without the program's name.

    Returns:
        The exit status: 0 when everything was done.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-spyre-mm", description="Tools beside `vllm serve` on the Spyre platform."
    )
    parser.add_argument("--version", action="version", version=version("vllm-spyre-mm"))
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"{__name__}.{name}")
        subparser = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)
