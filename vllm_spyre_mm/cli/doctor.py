# SPDX-License-Identifier: Apache-2.0
"""``vllm-spyre-mm doctor``: whether an installation and a model would start, and what to do."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_spyre_mm.doctor import Finding

SUMMARY = "check this installation, and a model's folder, and say what to do"

INDENT = 22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", nargs="?", type=Path, help="folder of a checkpoint to check too")
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: a start with random weights, for which their files need not be there",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array of the findings")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; the exit status is 1 if one of them would stop a start."""
    from vllm_spyre_mm.doctor import examine

    findings = []
    dummy = arguments.load_format == "dummy"
    for finding in examine(arguments.model, dummy_weights=dummy):
        findings.append(finding)
        if not arguments.json:
            print(_lines(finding), flush=True)
    errors = sum(finding.level == "error" for finding in findings)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        warnings = sum(finding.level == "warning" for finding in findings)
        print(f"\n{len(findings)} findings: {errors} errors, {warnings} warnings")
    return int(errors > 0)


def _lines(finding: "Finding") -> str:
    line = f"{finding.level:8} {finding.check:12} {finding.says}"
    return f"{line}\n{'-> ':>{INDENT}}{finding.do}" if finding.do else line
