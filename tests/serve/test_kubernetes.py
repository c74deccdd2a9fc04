"""The manifest for Kubernetes says what `bedplate serve` does: its options, ports, paths, and times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bedplate.cli import serving
from bedplate.cli.main import app as command_line
from bedplate.serve import api
from bedplate.serve.app import create_app

MANIFEST = Path(__file__).parents[2] / "examples" / "deploy" / "kubernetes.yaml"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def parts() -> dict[str, Json]:
    """What the manifest has, by its kind."""
    found = {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}
    assert list(found) == ["Deployment", "Service", "InferencePool"]
    return found


@pytest.fixture(scope="module")
def pod(parts: dict[str, Json]) -> Json:
    template: Json = parts["Deployment"]["spec"]["template"]
    return template


@pytest.fixture(scope="module")
def container(pod: Json) -> Json:
    (container,) = pod["spec"]["containers"]
    found: Json = container
    return found


@pytest.fixture(scope="module")
def options(container: Json) -> Json:
    """What the command line makes of its arguments. They are refused if it does not know them."""
    assert container["command"] == ["bedplate"] and container["args"][0] == "serve"
    serve = command_line.get_command(None, "serve")
    with serve.make_context("serve", container["args"][1:]) as context:
        parsed: Json = context.params
    return parsed


def _ports(container: Json) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container["ports"]}


def test_ports(parts: dict[str, Json], pod: Json, container: Json, options: Json) -> None:
    assert list(_ports(container).values()) == [options["port"]]
    assert options["host"] == "0.0.0.0", "other machines ask"
    (port,) = parts["Service"]["spec"]["ports"]
    assert port["targetPort"] in _ports(container)
    assert parts["InferencePool"]["spec"]["targetPorts"] == [{"number": options["port"]}]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(options["port"])


def test_paths(pod: Json, container: Json) -> None:
    asked = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    asked.add(pod["metadata"]["annotations"]["prometheus.io/path"])
    opened = {one.path for one in create_app([]).routes if isinstance(one, api.Api) and one.is_open}
    assert asked == opened == {"/health", "/ready", "/metrics"}, "they are asked without a key"
    for name in ("startup", "readiness", "liveness"):
        assert container[f"{name}Probe"]["httpGet"]["port"] in _ports(container)


def test_labels(parts: dict[str, Json], pod: Json) -> None:
    labels = pod["metadata"]["labels"]
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert parts["Service"]["spec"]["selector"] == labels
    assert parts["InferencePool"]["spec"]["selector"]["matchLabels"] == labels


def test_files(pod: Json, container: Json, options: Json) -> None:
    """What the command reads is mounted, and each mount has a volume."""
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert set(mounts.values()) == {one["name"] for one in pod["spec"]["volumes"]}
    for path in (*options["bundles"], options["api_key_file"]):
        assert str(Path(path).parent) in mounts


def test_times(pod: Json, container: Json, options: Json) -> None:
    """Answers can end before the pod is killed, and a pod that ends is told to nobody while it drains."""
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] < options["drain"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > options["drain"] + 5


def test_memory(container: Json, options: Json) -> None:
    """The budget of adapters, keys and values leaves room for the foundation."""
    most = container["resources"]["limits"]["memory"]
    assert most.endswith("Gi")
    assert serving._bytes(options["memory"]) < int(most.removesuffix("Gi")) << 30
