# SPDX-License-Identifier: Apache-2.0
"""What the tests of the checks share."""

from collections.abc import Iterable
from pathlib import Path

from vllm_spyre_mm.doctor import Finding


def only(findings: Iterable[Finding]) -> Finding:
    """The one finding, which says what to do unless all is well."""
    (finding,) = findings
    assert finding.level == "ok" or finding.do
    return finding


def pretend_installed(folder: Path, name: str, version: str) -> None:
    """Put the metadata of a distribution into a folder that is to come first on the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
