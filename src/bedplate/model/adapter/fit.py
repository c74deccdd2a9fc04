"""An adapter as its files have it, against a model: every matrix must fit a linear of the model.

Its files name the linears of the model's own files. One of those may be several of ours, one below the other: then
A is of all of them, and each has its rows of B, of magnitudes and of biases. What the model stores in another way, an
adapter's values of it are changed in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.types import (
    AGAIN,
    EMBEDDING,
    HEAD,
    Adapter,
    LoraPair,
    Place,
    RawAdapter,
    TokenRows,
    module_of,
)
from bedplate.model.rotary_order import in_our_order, turned_heads
from bedplate.model.stored import Rows, sources, stored_linears
from bedplate.spec import ModelSpec, linear_shapes, parameter_shapes

BRANCHES_ALONE = "train it with nothing but A and B of linears"
_OTHER = "add the adapter to the model that it was trained on"


def check_places(places: Iterable[Place], spec: ModelSpec, where: Path) -> None:
    """AdapterError: the model has no such linear or layer."""
    linears = stored_linears(spec)
    for layer, linear in places:
        if layer is not None and (linear not in linears or layer >= spec.n_layers):
            raise AdapterError(
                f"it adapts layers.{layer}.{linear}, which the model does not have",
                where=where,
                hint=f"the model has {spec.n_layers} layers with {', '.join(linears)}",
            )


def fit(raw: RawAdapter, spec: ModelSpec) -> Adapter:
    """Check the places, the shapes and the range of the numbers. Raises AdapterError or UnsupportedError."""
    layers = spec.layers if raw.layers is None else tuple(spec.layers[layer] for layer in raw.layers)
    own = replace(spec, layers=layers, vocab_size=_vocab(raw, spec))
    shapes = linear_shapes(own)
    check_places(raw.pairs, own, raw.weights)
    pairs: dict[Place, LoraPair] = {}
    for place, pair in raw.pairs.items():
        for part, fitting in _parts(place, pair, own, raw.weights):
            pairs[place[0], part] = fitting
    _check_invocation(raw, own, spec)
    parameters = dict(_parameters(raw, own))
    _check_rows(raw.rows, own, raw.weights)
    if not pairs and not parameters and not raw.rows and raw.layers is None:
        raise AdapterError("it adapts nothing: there are no tensors in it", where=raw.weights, hint=AGAIN)
    adapted = [linear for linear in shapes if any(linear == name for _, name in pairs)]
    adapter = Adapter(
        path=raw.path,
        format=raw.format,
        alpha=raw.alpha,
        spec=own,
        layers=raw.layers,
        invocation=raw.invocation,
        ranks={
            linear: max(len(pair.a) for (_, name), pair in pairs.items() if name == linear)
            for linear in adapted
        },
        shapes={linear: shapes[linear] for linear in adapted},
        pairs=pairs,
        parameters=parameters,
        rows=raw.rows,
        fingerprint=raw.fingerprint,
        warnings=raw.warnings,
    )
    adapter.check_range(raw.weights)
    return adapter


def _parts(place: Place, pair: LoraPair, spec: ModelSpec, where: Path) -> Iterator[tuple[str, LoraPair]]:
    """Our linears that a linear of the files is made of, and what is added to each."""
    layer, linear = place
    tables = {EMBEDDING: (spec.dim, spec.vocab_size), HEAD: (spec.vocab_size, spec.dim)}
    shapes = tables if layer is None else linear_shapes(spec)
    parts = stored_linears(spec)[linear] if layer is not None else _whole(linear, tables)
    rank, rows, columns = pair.a.shape[0], sum(part.count for part in parts), shapes[parts[0].linear][1]
    vectors = (("magnitude", pair.magnitude), ("bias", pair.bias))
    wanted: list[tuple[str, NDArray[np.float32], tuple[int, ...]]]
    wanted = [("lora_A", pair.a, (rank, columns)), ("lora_B", pair.b, (rows, rank))]
    wanted += [(f"the {name}", value, (rows,)) for name, value in vectors if value is not None]
    for name, value, shape in wanted:
        if value.shape != shape:
            raise AdapterError(
                f"{name} of {module_of(place)} has shape {value.shape}, "
                f"but the model and rank {rank} need {shape}",
                where=where,
                hint=_OTHER,
            )
    for part in parts:

        def own(value: NDArray[np.float32], part: Rows = part) -> NDArray[np.float32]:
            return _in_order(value[part.first : part.first + part.count], part.linear, spec)

        yield (
            part.linear,
            LoraPair(
                a=pair.a,
                b=own(pair.b),
                scale=pair.scale,
                magnitude=None if pair.magnitude is None else own(pair.magnitude),
                bias=None if pair.bias is None else own(pair.bias),
            ),
        )


def _whole(linear: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[Rows, ...]:
    return (Rows(linear=linear, first=0, count=shapes[linear][0]),)


def _in_order(rows: NDArray[np.float32], linear: str, spec: ModelSpec) -> NDArray[np.float32]:
    heads = turned_heads(linear, spec)
    return in_our_order(rows, heads, spec.rotary) if heads else rows


def _parameters(raw: RawAdapter, spec: ModelSpec) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Our parameters that the adapter has new values of."""
    shapes, places = parameter_shapes(spec), sources(spec)
    if f"{HEAD}.weight" in raw.parameters and spec.tied_head:
        shapes[f"{HEAD}.weight"] = (spec.vocab_size, spec.dim)
        places[f"{HEAD}.weight"] = replace(places[f"{EMBEDDING}.weight"], name=f"{HEAD}.weight")
    rows: dict[str, int] = {}
    for place in places.values():
        rows[place.name] = max(rows.get(place.name, 0), place.first + place.count)
    for name, place in places.items():
        if (value := raw.parameters.get(place.name)) is None:
            continue
        wanted = (rows[place.name], *shapes[name][1:])
        if value.shape != wanted:
            raise AdapterError(
                f"its {place.name} has shape {value.shape}, the model's has {wanted}",
                where=raw.weights,
                hint=_OTHER,
            )
        part = value[place.first : place.first + place.count] + np.float32(place.offset)
        yield name, in_our_order(part, place.heads, spec.rotary) if place.heads else part


def _vocab(raw: RawAdapter, spec: ModelSpec) -> int:
    """How many tokens its embedding and head have. Raises AdapterError, UnsupportedError."""
    own = [
        raw.parameters[name] for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") if name in raw.parameters
    ]
    sizes = {len(table) for table in own if table.ndim == 2}
    if pair := raw.pairs.get((None, EMBEDDING)):
        sizes.add(pair.a.shape[1])
    if pair := raw.pairs.get((None, HEAD)):
        sizes.add(len(pair.b))
    if len(sizes) > 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise AdapterError(f"its embedding and its head have {found} tokens", where=raw.weights, hint=AGAIN)
    size = sizes.pop() if sizes else spec.vocab_size
    if size < spec.vocab_size:
        raise UnsupportedError(
            f"its vocabulary has {size} tokens, fewer than the {spec.vocab_size} of the model",
            where=raw.weights,
            hint="train it with as many rows in the embedding as the model has, or more",
        )
    if size > spec.vocab_size and len(own) < 2:
        raise AdapterError(
            f"its vocabulary has {size} tokens, the model's {spec.vocab_size}, but the weights do not hold both "
            "the embedding and the head",
            where=raw.weights,
            hint="train it with both of them in target_modules, or with none: PEFT then saves both",
        )
    return size


def _check_invocation(raw: RawAdapter, own: ModelSpec, base: ModelSpec) -> None:
    """Before its invocation, an activated LoRA must be the base. PEFT turns only branches off.

    Raises AdapterError or UnsupportedError. What it has of the embedding and the head may be the base's, see
    `pack_adapter`.
    """
    if raw.invocation is None:
        return
    if wrong := [token for token in raw.invocation if token >= base.vocab_size]:
        raise AdapterError(
            f"its invocation has the token {wrong[0]}, but the model has {base.vocab_size} tokens",
            where=raw.path,
            hint=_OTHER,
        )
    tables = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
    always = [name for name in raw.parameters if name not in tables]
    parts = {
        "DoRA": any(pair.magnitude is not None for pair in raw.pairs.values()),
        f"{(*always, '')[0]} of its own": bool(always),
        "trained tokens": bool(raw.rows),
        "replicated layers": raw.layers is not None,
        "more tokens than the base": own.vocab_size != base.vocab_size,
    }
    if what := [name for name, is_there in parts.items() if is_there]:
        raise UnsupportedError(activated_with(what[0]), where=raw.path, hint=BRANCHES_ALONE)


def activated_with(what: str) -> str:
    """What to say of an activated LoRA that is not the base before its invocation."""
    return f"an activated LoRA (aLoRA) with {what} is not supported: before its invocation it would not be the base"


def _check_rows(rows: Mapping[str, TokenRows], spec: ModelSpec, where: Path) -> None:
    for table, of_table in rows.items():
        if of_table.ids[-1] >= spec.vocab_size:
            raise AdapterError(
                f"it has a row of token {of_table.ids[-1]} in {table}, but the model has {spec.vocab_size} tokens",
                where=where,
                hint=_OTHER,
            )
