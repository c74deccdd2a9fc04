"""An adapter as its files have it, against a model: every matrix must fit a linear of the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bedplate.errors import AdapterError
from bedplate.model.adapter.types import AGAIN, Adapter, Place, RawAdapter
from bedplate.spec import ModelSpec, linear_shapes


def check_places(places: Iterable[Place], spec: ModelSpec, where: Path) -> None:
    """AdapterError: the model has no such linear or layer."""
    shapes = linear_shapes(spec)
    for layer, linear in places:
        if linear not in shapes or layer >= spec.n_layers:
            raise AdapterError(
                f"it adapts layers.{layer}.{linear}, which the model does not have",
                where=where,
                hint=f"the model has {spec.n_layers} layers with {', '.join(shapes)}",
            )


def fit(raw: RawAdapter, spec: ModelSpec) -> Adapter:
    """Check the places, the shapes and the range of the numbers. Raises AdapterError."""
    shapes = linear_shapes(spec)
    check_places(raw.pairs, spec, raw.weights)
    for (layer, linear), pair in raw.pairs.items():
        rows, columns = shapes[linear]
        rank = pair.a.shape[0]
        for half, value, wanted in (("A", pair.a, (rank, columns)), ("B", pair.b, (rows, rank))):
            if value.shape != wanted:
                raise AdapterError(
                    f"lora_{half} of layers.{layer}.{linear} has shape {value.shape}, "
                    f"but the model and rank {rank} need {wanted}",
                    where=raw.weights,
                    hint="add the adapter to the model that it was trained on",
                )
    if not raw.pairs:
        raise AdapterError("it adapts nothing: there are no tensors in it", where=raw.weights, hint=AGAIN)
    adapted = [linear for linear in shapes if any(linear == name for _, name in raw.pairs)]
    adapter = Adapter(
        path=raw.path,
        format=raw.format,
        alpha=raw.alpha,
        ranks={
            linear: max(len(pair.a) for (_, name), pair in raw.pairs.items() if name == linear)
            for linear in adapted
        },
        shapes={linear: shapes[linear] for linear in adapted},
        n_layers=spec.n_layers,
        fingerprint=raw.fingerprint,
        warnings=raw.warnings,
        _pairs=raw.pairs,
    )
    adapter.check_range(raw.weights)
    return adapter
