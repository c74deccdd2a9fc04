"""The application of Ray Serve: replicas, and an ingress before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from bedplate.deploy.ray.ingress import Ingress
from bedplate.deploy.ray.options import RayOptions
from bedplate.deploy.ray.replica import Replica
from bedplate.deploy.ray.router import AdapterRouter


def build_app(args: RayOptions | Mapping[str, Any]) -> Application:
    """Serve a bundle and its adapters on many machines: `serve run bedplate.deploy.ray:build_app bundle=…`.

    args: a `RayOptions`, or its fields.
    """
    options = args if isinstance(args, RayOptions) else RayOptions.model_validate(dict(args))
    replicas = serve.deployment(
        Replica,
        name="replicas",
        max_ongoing_requests=options.max_requests,
        max_queued_requests=options.max_waiting,
        graceful_shutdown_timeout_s=options.drain_seconds,
        ray_actor_options={"num_cpus": options.threads},
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter, request_router_kwargs={"spill": options.spill}
        ),
        **_scaling(options),
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=options.ingresses,
        # It only passes on: the replicas say how much is too much.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=options.drain_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(options), options)


def _scaling(options: RayOptions) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
        }
    }
