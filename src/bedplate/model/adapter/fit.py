"""An adapter as its files have it, against a model: every matrix must fit a linear of the model.

Its files name the linears of the model's own files. One of those may be several of ours, one below the other: then
A is of all of them, and each has its rows of B.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from bedplate.errors import AdapterError
from bedplate.model.adapter.types import AGAIN, Adapter, LoraPair, Place, RawAdapter
from bedplate.model.rotary_order import in_our_order, turned_heads
from bedplate.model.stored import stored_linears
from bedplate.spec import ModelSpec, linear_shapes


def check_places(places: Iterable[Place], spec: ModelSpec, where: Path) -> None:
    """AdapterError: the model has no such linear or layer."""
    linears = stored_linears(spec)
    for layer, linear in places:
        if linear not in linears or layer >= spec.n_layers:
            raise AdapterError(
                f"it adapts layers.{layer}.{linear}, which the model does not have",
                where=where,
                hint=f"the model has {spec.n_layers} layers with {', '.join(linears)}",
            )


def fit(raw: RawAdapter, spec: ModelSpec) -> Adapter:
    """Check the places, the shapes and the range of the numbers. Raises AdapterError."""
    shapes = linear_shapes(spec)
    check_places(raw.pairs, spec, raw.weights)
    pairs: dict[Place, LoraPair] = {}
    for (layer, linear), pair in raw.pairs.items():
        for part, fitting in _parts(layer, linear, pair, spec, raw.weights):
            pairs[layer, part] = fitting
    if not pairs:
        raise AdapterError("it adapts nothing: there are no tensors in it", where=raw.weights, hint=AGAIN)
    adapted = [linear for linear in shapes if any(linear == name for _, name in pairs)]
    adapter = Adapter(
        path=raw.path,
        format=raw.format,
        alpha=raw.alpha,
        ranks={
            linear: max(len(pair.a) for (_, name), pair in pairs.items() if name == linear)
            for linear in adapted
        },
        shapes={linear: shapes[linear] for linear in adapted},
        n_layers=spec.n_layers,
        fingerprint=raw.fingerprint,
        warnings=raw.warnings,
        _pairs=pairs,
    )
    adapter.check_range(raw.weights)
    return adapter


def _parts(
    layer: int, linear: str, pair: LoraPair, spec: ModelSpec, where: Path
) -> Iterator[tuple[str, LoraPair]]:
    """Our linears that a linear of the files is made of, and what is added to each."""
    parts, rank = stored_linears(spec)[linear], pair.a.shape[0]
    rows, columns = sum(part.count for part in parts), linear_shapes(spec)[parts[0].linear][1]
    for half, value, wanted in (("A", pair.a, (rank, columns)), ("B", pair.b, (rows, rank))):
        if value.shape != wanted:
            raise AdapterError(
                f"lora_{half} of layers.{layer}.{linear} has shape {value.shape}, "
                f"but the model and rank {rank} need {wanted}",
                where=where,
                hint="add the adapter to the model that it was trained on",
            )
    for part in parts:
        b, heads = pair.b[part.first : part.first + part.count], turned_heads(part.linear, spec)
        b = in_our_order(b, heads, spec.rotary) if heads else b
        yield part.linear, LoraPair(a=pair.a, b=b, scale=pair.scale)
