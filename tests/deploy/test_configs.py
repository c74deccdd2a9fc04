"""The configurations in examples/deploy, and what Ray makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from bedplate.deploy.ray import RayOptions, build_app

EXAMPLES = Path(__file__).parents[2] / "examples" / "deploy"


def configs() -> dict[str, Any]:
    """Of Ray Serve, by where they stand."""
    manifests = yaml.safe_load_all((EXAMPLES / "kuberay.yaml").read_text())
    (service,) = (one for one in manifests if one["kind"] == "RayService")
    return {
        "ray.yaml": yaml.safe_load((EXAMPLES / "ray.yaml").read_text()),
        "kuberay.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", configs())
def test_an_example_is_what_ray_and_the_application_take(name: str) -> None:
    (application,) = ServeDeploySchema.model_validate(configs()[name]).applications
    assert application.import_path == "bedplate.deploy.ray:build_app"
    options = RayOptions.model_validate(application.args)
    assert options.api_key_file, "others reach it"
    built = build_app(application.args)
    assert built._bound_deployment.name == "ingress"


def test_what_scales() -> None:
    arguments = {"bundle": "b", "replicas": 2, "threads": 4}
    (replicas,) = _replicas(arguments)
    assert replicas.num_replicas == 2 and replicas.ray_actor_options["num_cpus"] == 4
    (replicas,) = _replicas({**arguments, "max_replicas": 5, "target_requests": 3})
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)


def _replicas(arguments: dict[str, Any]) -> list[Any]:
    """The deployment that the ingress gets."""
    bound = build_app(arguments)._bound_deployment
    return [one._bound_deployment for one in bound.init_args if hasattr(one, "_bound_deployment")]
