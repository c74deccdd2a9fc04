"""What a manifest says of its model → dimensions that can be computed with."""

from __future__ import annotations

import math

from bedplate.bundle import strict_json
from bedplate.bundle.manifest import MANIFEST
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError
from bedplate.spec import ModelSpec, rope_frequencies

_MOST = 1 << 24  # of any dimension: as the native layer
_MOST_HEAD_DIM = 4096
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_positions")


def read_spec(bundle: Bundle) -> ModelSpec:
    """The dimensions of the bundle's model. BundleError: a field is missing or no model has such a value."""
    where, model = f"{bundle.path / MANIFEST}.model", bundle.manifest.model
    known = {name: model[name] for name in ModelSpec.__dataclass_fields__ if name in model}
    spec = strict_json.decode(ModelSpec, known, where)
    if wrong := _wrong(spec):
        raise BundleError(wrong, where=where, hint=strict_json.DAMAGED)
    return spec


def _wrong(spec: ModelSpec) -> str | None:
    for name in _SIZES:
        size = getattr(spec, name)
        if not 1 <= size <= (_MOST_HEAD_DIM if name == "head_dim" else _MOST):
            return f"the field {name!r} is {size}"
    if spec.head_dim % 2 or spec.n_heads % spec.n_kv_heads:
        return f"{spec.n_heads} heads of {spec.head_dim} cannot read {spec.n_kv_heads} kv heads"
    if not 0 < spec.norm_eps < 1:
        return f"the field 'norm_eps' is {spec.norm_eps}"
    try:
        frequencies = rope_frequencies(spec.rope, spec.head_dim)
    except (ArithmeticError, TypeError):  # TypeError: the power of a negative number is complex
        frequencies = [math.nan]
    if not all(map(math.isfinite, frequencies)):
        return f"the field 'rope' is {spec.rope}, which turns by angles that are no numbers"
    return None
