"""Serve a bundle on many machines, with Ray Serve."""

from bedplate.deploy.ray.app import build_app
from bedplate.deploy.ray.options import RayOptions

__all__ = ["RayOptions", "build_app"]
