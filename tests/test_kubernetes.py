# SPDX-License-Identifier: Apache-2.0
"""The manifests in ``deploy/kubernetes``: valid for Kubernetes, and of one piece with the rest."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from vllm.config import ECTransferConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.test_container import PYPROJECT, SERVE, given
from vllm_spyre_mm.scheduler.folder_connector import FolderSettings

FOLDER = Path(__file__).parents[1] / "deploy" / "kubernetes"
PROXY = Path(__file__).parents[1] / "examples" / "online_serving" / "encoder_proxy"
FILES = sorted(FOLDER.glob("*.yaml"))
OLDEST = "1.30.0"
"""The oldest release of Kubernetes that is checked for; the newest is the library's."""


def resources(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


RESOURCES = [
    pytest.param(each, id=f"{file.stem} {each['kind']} {each['metadata']['name']}")
    for file in FILES
    for each in resources(file)
]


def workloads(file: Path) -> Iterator[dict[str, Any]]:
    """Deployments and the like, which have a template of pods."""
    return (each for each in resources(file) if "template" in each.get("spec", {}))


def containers(file: Path) -> Iterator[dict[str, Any]]:
    for each in workloads(file):
        yield from each["spec"]["template"]["spec"]["containers"]


def servers() -> list[Any]:
    """Containers that run the image's own command."""
    return [
        pytest.param(each, id=f"{file.stem} {each['name']}")
        for file in FILES
        for each in containers(file)
        if "command" not in each
    ]


@pytest.mark.parametrize("resource", RESOURCES)
def test_kubernetes_takes_it(resource: dict[str, Any]) -> None:
    """By the schemas of its own API, in which nothing may stand that they do not know."""
    for version in (OLDEST, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    resource = resources(FOLDER / "server.yaml")[0]
    resource["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, OLDEST, strict=True)


@pytest.mark.parametrize("container", servers())
def test_a_server_is_given_flags_that_vllm_has(container: dict[str, Any]) -> None:
    """Behind the command of the image, at the port that it listens at."""
    (entrypoint,) = given(SERVE, "ENTRYPOINT")
    _, _, model, *flags = json.loads(entrypoint)
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args([model, *flags, *container["args"]])
    assert [arguments.port] == [port["containerPort"] for port in container["ports"]]
    assert {"name": "model", "mountPath": arguments.model_tag, "readOnly": True} in container[
        "volumeMounts"
    ]
    transfer = arguments.ec_transfer_config
    if container["name"] == "server":
        assert transfer is None
        return
    assert isinstance(transfer, ECTransferConfig)
    assert (
        transfer.ec_role == {"encoder": "ec_producer", "decoder": "ec_consumer"}[container["name"]]
    )
    settings = FolderSettings.parse(transfer.ec_connector_extra_config)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    (claim,) = (
        each
        for each in resources(FOLDER / "volumes.yaml")
        if each["metadata"]["name"] == mounts[str(settings.folder)]
    )
    size = claim["spec"]["resources"]["requests"]["storage"]
    assert settings.max_bytes < int(size.removesuffix("Gi")) << 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_parts_of_a_workload_name_each_other(file: Path) -> None:
    services = {
        each["metadata"]["name"]: each["spec"]
        for each in resources(file)
        if each["kind"] == "Service"
    }
    claims = {each["metadata"]["name"] for each in resources(FOLDER / "volumes.yaml")}
    for workload in workloads(file):
        name, spec = workload["metadata"]["name"], workload["spec"]
        pod = spec["template"]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == labels == services[name]["selector"]
        if workload["kind"] == "StatefulSet":
            assert services[spec["serviceName"]]["clusterIP"] == "None"
        assert pod["securityContext"]["runAsUser"] == int(given(SERVE, "USER")[0])
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        (port,) = services[name]["ports"]
        assert port["targetPort"] == container["ports"][0]["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def shutdown_timeout(container: dict[str, Any]) -> int:
    """Seconds that a server takes for running requests when it is told to end."""
    flag = "--shutdown-timeout="
    (argument,) = (each for each in container["args"] if each.startswith(flag))
    return int(argument.removeprefix(flag))


@pytest.mark.parametrize(
    "file", [file for file in FILES if any(workloads(file))], ids=lambda file: file.stem
)
def test_running_requests_may_finish(file: Path) -> None:
    """A pod that is told to end waits until nobody sends it requests, then finishes those it has;
    it has time for both. Pods with names of their own are the proxies' to leave."""
    services = {
        each["metadata"]["name"]: each["spec"]
        for each in resources(file)
        if each["kind"] == "Service"
    }
    for workload in workloads(file):
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        waits = 0
        if services[workload["metadata"]["name"]].get("clusterIP") != "None":
            waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert waits >= 5
        runs = 30 if container["name"] == "proxy" else shutdown_timeout(container)
        assert waits + runs < pod["terminationGracePeriodSeconds"]


def test_the_proxy_names_every_encoder_and_decoder() -> None:
    file = FOLDER / "fleet.yaml"
    expected = set()
    for workload in workloads(file):
        if workload["kind"] == "StatefulSet":
            name = workload["metadata"]["name"]
            for number in range(workload["spec"]["replicas"]):
                expected.add(f"--{name.removesuffix('s')}=http://{name}-{number}.{name}:8000")
    (proxy,) = (each for each in containers(file) if each["name"] == "proxy")
    addresses = {each for each in proxy["args"] if "=http" in each}
    assert addresses == expected
    assert (PROXY / Path(proxy["command"][-1]).name).exists()
    page = (Path(__file__).parents[1] / "docs" / "kubernetes.md").read_text()
    assert f"--from-file {PROXY.relative_to(Path(__file__).parents[1])}\n" in page
    assert f"--port={proxy['ports'][0]['containerPort']}" in proxy["args"]


def test_kserve_runs_the_image_with_flags_that_vllm_has() -> None:
    """Its kinds are its own: Kubernetes' schemas know nothing of them."""
    (runtime,), (service,) = (
        resources(FOLDER / "kserve" / f"{name}.yaml") for name in ("runtime", "service")
    )
    (container,) = runtime["spec"]["containers"]
    _, _, model, *flags = [*container["command"], *container["args"]]
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([model, *flags])
    assert arguments.model_tag == "/mnt/models"
    assert arguments.served_model_name == ["{{.Name}}"]
    assert [arguments.port] == [port["containerPort"] for port in container["ports"]]
    assert shutdown_timeout(container) < 30  # what a pod has that does not say
    asked = service["spec"]["predictor"]["model"]
    assert asked["runtime"] == runtime["metadata"]["name"]
    formats = [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    assert asked["modelFormat"]["name"] in formats
    (server,) = containers(FOLDER / "server.yaml")
    assert container["image"] == server["image"]


def test_images_are_of_this_version() -> None:
    version = PYPROJECT["project"]["version"].removesuffix(".dev0")
    images = {each["image"] for file in FILES for each in containers(file)}
    assert images == {f"vllm-spyre-mm:{version}"}
