"""What a manifest says of its model → a description that can be computed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bedplate.bundle import strict_json
from bedplate.bundle.manifest import MANIFEST
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError
from bedplate.spec import ModelSpec
from bedplate.spec_check import flaw


def read_spec(bundle: Bundle) -> ModelSpec:
    """The description of the bundle's model. BundleError: a field is missing or no model has such a value."""
    return decode_spec(bundle.manifest.model, f"{bundle.path / MANIFEST}.model")


def decode_spec(model: Mapping[str, Any], where: str) -> ModelSpec:
    """The description in what a manifest says of a model; it says more than that. BundleError: as in read_spec."""
    known = {name: model[name] for name in ModelSpec.__dataclass_fields__ if name in model}
    spec = strict_json.decode(ModelSpec, known, where)
    if wrong := flaw(spec):
        raise BundleError(wrong, where=where, hint=strict_json.DAMAGED)
    return spec
