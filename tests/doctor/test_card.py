# SPDX-License-Identifier: Apache-2.0
"""What is missing or wrong on a card's host is named, one fault at a time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.card_hosts import SENLIB, image, with_variables
from tests.doctor.findings import only, pretend_installed
from vllm_spyre_mm.doctor import card, examine, examine_card, installation
from vllm_spyre_mm.doctor import host as of_host
from vllm_spyre_mm.doctor.card import CardHost
from vllm_spyre_mm.doctor.card_variables import variables

CHECKS = {"mode", "devices", "senlib", "shm", "variables", "torch_sendnn"}


def pretend_pair(folder: Path, monkeypatch: pytest.MonkeyPatch, sendnn: str, torch: str) -> None:
    pretend_installed(folder, "torch_sendnn", sendnn)
    pretend_installed(folder, "torch", torch)
    monkeypatch.syspath_prepend(str(folder))


# -- a whole image ------------------------------------------------------------------------------


def test_an_image_with_two_cards_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pair(tmp_path / "packages", monkeypatch, "1.3.1", "2.11.0+cpu")
    findings = [*examine_card(image(tmp_path, cards=2))]
    assert {finding.check for finding in findings} == CHECKS
    assert [finding for finding in findings if finding.level != "ok"] == []
    says = {finding.check: finding.says for finding in findings}
    assert says["mode"] == "a card (FLEX_COMPUTE is SENTIENT, FLEX_DEVICE PF)"
    assert says["devices"] == "0000:1a:00.0, 0000:1b:00.0: --tensor-parallel-size 2 at most"
    assert says["torch_sendnn"] == "torch_sendnn 1.3.1 with torch 2.11.0+cpu"


def test_an_image_without_its_setup_names_everything(tmp_path: Path) -> None:
    """A variable is left over, and nothing else of what the image needs."""
    left = {"FLEX_COMPUTE": "SENTIENT"}
    empty = CardHost(
        left, "s390x", lambda: 4, tmp_path / "vfio", tmp_path / ".senlib.json", 64 << 20
    )
    findings = [*examine_card(empty)]
    said = {finding.says for finding in findings if finding.level != "ok"}
    assert said == {
        "torch_sendnn, the card's compiler, is not installed, or without its metadata",
        "FLEX_COMPUTE is SENTIENT, FLEX_DEVICE not set: the runtime may take a simulator without a "
        "word",
        f"there is no {tmp_path / 'vfio'}",
        "AIU_WORLD_RANK_0 is not set: no card is named",
        "there is no .senlib.json in the home folder",
    }
    assert all(finding.do for finding in findings if finding.level != "ok")
    (mode,) = (finding for finding in findings if finding.check == "mode")
    assert mode.do == "for a card set FLEX_COMPUTE=SENTIENT and FLEX_DEVICE=VF"


def test_cards_are_looked_at_where_there_is_a_trace_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, names in (
        (installation, ("python", "versions", "plugin", "torchvision", "hooks")),
        (of_host, ("backend", "compiler", "cpu", "threads", "memory")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda: iter(()))
    senlib = tmp_path / ".senlib.json"
    nothing = CardHost({}, "x86_64", lambda: 4, tmp_path, senlib, 0)
    assert [*examine(card_host=nothing)] == []
    assert replace(nothing, variables={"SPYRE_DEVICES": "0"}).has_traces
    senlib.touch()
    assert {finding.check for finding in examine(card_host=nothing)} == CHECKS


# -- one fault ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "device", "level", "says"),
    [
        ("SENTIENT", "VF", "ok", "a card ("),
        ("SENULATOR", "MOCK", "warning", "a simulator, and no card ("),
        ("SENTIENT", "MOCK", "warning", "a simulator, and no card ("),
        ("SENULATOR", "PF", "warning", "a simulator, and no card ("),
        ("SENTIENT", "COMPILE", "error", "programs are compiled and never run ("),
        (None, None, "warning", "FLEX_COMPUTE is not set, FLEX_DEVICE not set: "),
        ("SENTIENT", "XF", "warning", "FLEX_COMPUTE is SENTIENT, FLEX_DEVICE XF, which no"),
    ],
)
def test_the_mode(
    tmp_path: Path, compute: str | None, device: str | None, level: str, says: str
) -> None:
    host = with_variables(image(tmp_path), FLEX_COMPUTE=compute, FLEX_DEVICE=device)
    finding = only(card.mode(host))
    assert finding.level == level
    assert finding.says.startswith(says)
    if device in ("MOCK", "COMPILE"):
        assert only(card.devices(replace(host, vfio=tmp_path / "none"))).level == "ok"


DEVICES: list[tuple[dict[str, str | None], str]] = [
    ({"AIU_WORLD_RANK_0": None}, "AIU_WORLD_RANK_n are set for [1]"),
    ({"AIU_WORLD_RANK_1": "1a:00.0"}, "AIU_WORLD_RANK_1='1a:00.0' is no PCI address"),
    ({"AIU_WORLD_RANK_1": "0000:1a:00.0"}, "two AIU_WORLD_RANK_n name one card"),
    ({"AIU_WORLD_SIZE": "1"}, "AIU_WORLD_SIZE=1 does not count the 2 AIU_WORLD_RANK_n"),
    ({"SPYRE_DEVICES": "0"}, "SPYRE_DEVICES lists 1 devices for 2 cards"),
]


@pytest.mark.parametrize(("changes", "says"), DEVICES, ids=str)
def test_a_fault_of_the_devices(tmp_path: Path, changes: dict[str, str | None], says: str) -> None:
    host = with_variables(image(tmp_path, cards=2), **changes)
    assert says in [finding.says for finding in card.devices(host) if finding.level == "error"]
    assert only(card.devices(image(tmp_path / "well", cards=2))).level == "ok"


def test_fewer_devices_than_cards(tmp_path: Path) -> None:
    host = image(tmp_path, cards=2)
    (host.vfio / "41").unlink()
    assert only(card.devices(host)).says == f"{host.vfio} holds 1 devices for 2 cards"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("SNT_MCI", "DCR", "MCI_CTRL", "ENABLE_RISCV"), "0x1", 'ENABLE_RISCV is not "0x0"'),
        (("RISCV", "DOOM", "enable"), True, "doom is enabled"),
    ],
)
def test_the_librarys_configuration(
    tmp_path: Path, path: tuple[str, ...], value: object, says: str
) -> None:
    host = image(tmp_path)
    assert only(card.senlib(host)).level == "ok"
    stored = json.loads(json.dumps(SENLIB))
    *outer, last = path
    part = stored
    for name in outer:
        part = part[name]
    part[last] = value
    host.senlib.write_text(json.dumps(stored))
    assert only(card.senlib(host)).says == f"{says} in .senlib.json"


def test_a_configuration_that_says_nothing_or_is_broken(tmp_path: Path) -> None:
    host = image(tmp_path)
    host.senlib.write_text("{}")
    assert only(card.senlib(host)).says == 'ENABLE_RISCV is not "0x0" in .senlib.json'
    host.senlib.write_text("{,}")
    assert only(card.senlib(host)).says.startswith(".senlib.json is not JSON: ")


def test_shared_memory_is_for_several_cards(tmp_path: Path) -> None:
    one = image(tmp_path, shm_bytes=64 << 20)
    assert only(card.shared_memory(one)).level == "ok"
    two = image(tmp_path / "two", cards=2, shm_bytes=64 << 20)
    finding = only(card.shared_memory(two))
    assert (finding.level, finding.says) == ("error", "0.1 GiB of /dev/shm for 2 cards")


@pytest.mark.parametrize(
    ("sendnn", "torch", "level", "says"),
    [
        ("1.1.0", "2.7.1", "ok", "torch_sendnn 1.1.0 with torch 2.7.1"),
        ("1.2.0", "2.10.0", "ok", "torch_sendnn 1.2.0 with torch 2.10.0"),
        ("1.3.1", "2.13.0", "error", "torch_sendnn 1.3.1 goes with torch 2.11, and 2.13.0 is"),
        ("2.0.0", "2.13.0", "warning", "torch_sendnn 2.0.0 with torch 2.13.0: no pair"),
    ],
)
def test_the_pair_of_versions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sendnn: str,
    torch: str,
    level: str,
    says: str,
) -> None:
    pretend_pair(tmp_path / "packages", monkeypatch, sendnn, torch)
    finding = only(card.software(image(tmp_path)))
    assert finding.level == level
    assert finding.says.startswith(says)


VARIABLES: list[tuple[dict[str, str | None], str, str]] = [
    ({"COMPILATION_MODE": "offline"}, "error", "COMPILATION_MODE=offline is for other models"),
    ({"FLEX_OVERWRITE_NMB_FRAME": "0"}, "warning", "FLEX_OVERWRITE_NMB_FRAME=0: "),
    ({"DISABLE_COMPILATION": "true"}, "warning", "DISABLE_COMPILATION is set: "),
    ({"RANK": "0"}, "warning", "RANK=0 are set before the start"),
    ({"RANK": "0", "WORLD_SIZE": "4"}, "warning", "RANK=0 and WORLD_SIZE=4 are set before"),
    ({"FLEX_HDMA_COLLSIZE": "16777216"}, "warning", "FLEX_HDMA_COLLSIZE=16777216 is less than"),
    ({"VLLM_DT_CHUNK_LEN": "1024"}, "warning", "VLLM_DT_CHUNK_LEN=1024 is set, and the"),
    ({"DT_PARALLEL_THREADS": "16"}, "warning", "DT_PARALLEL_THREADS=16, and each of 4 ranks has 4"),
    ({"OMP_NUM_THREADS": "all"}, "error", "OMP_NUM_THREADS='all' is no number"),
]


@pytest.mark.parametrize(("changes", "level", "says"), VARIABLES, ids=str)
def test_a_variable_that_is_in_the_way(
    tmp_path: Path, changes: dict[str, str | None], level: str, says: str
) -> None:
    host = image(tmp_path, cards=4)
    assert only(variables(host)).level == "ok"
    finding = only(variables(with_variables(host, **changes)))
    assert finding.level == level
    assert finding.says.startswith(says)


def test_torch_nnpa_is_not_loaded_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = image(tmp_path)
    package = tmp_path / "packages" / "torch_nnpa"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD is 1: workers die" in only(variables(host)).says
    asked = with_variables(host, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert only(variables(asked)).level == "ok"


def test_what_is_looked_at_here() -> None:
    """The process's own environment and devices, whatever they are."""
    here = CardHost.here()
    assert here.cores is of_host.available_cores
    assert here.senlib == Path.home() / ".senlib.json"
    assert here.shm_bytes > 0
    assert "PATH" in here.variables


def test_the_page_about_troubleshooting_lists_the_checks() -> None:
    page = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    for check in CHECKS:
        assert f"\n| `{check}` | on a card's host: " in page.read_text()
