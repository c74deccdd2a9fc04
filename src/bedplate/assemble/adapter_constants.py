"""An adapter → its constants, against a foundation. In numpy, and one linear in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bedplate.bundle.values import Values
from bedplate.constants import TENSOR, Constant
from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.fit import BRANCHES_ALONE, activated_with
from bedplate.model.adapter.types import (
    AGAIN,
    EMBEDDING,
    HEAD,
    Adapter,
    LoraPair,
    Place,
    TokenRows,
    folded_b,
    folded_bias,
    module_of,
)
from bedplate.names import ROW_NORMS
from bedplate.quantize.packing import pack_float
from bedplate.quantize.recipe import Recipe, Scheme
from bedplate.quantize.rows import pack_branch
from bedplate.quantize.tables import pack_table
from bedplate.spec import ModelSpec

_BLOCK_NUMBERS = 1 << 22


def pack_adapter(
    adapter: Adapter, recipe: Recipe, ranks: Mapping[str, int], foundation: Values, base: Mapping[str, str]
) -> Iterator[Constant]:
    """The constants of an adapter by their names.

    recipe: the bundle's, with the adapter's scheme. ranks: of the branches at the linears of layers. A higher one than
    the adapter's gets rows of zeros below A and columns of zeros beside B: they add nothing.
    base: the keys of the foundation's constants, by names in the adapter's model. What is the base's is left out.
    Raises AdapterError for magnitudes (DoRA) of rows that are zero, UnsupportedError for an activated LoRA with tables
    of its own.
    """
    scheme = recipe.adapter
    for path, a, b in adapter.matrices():
        if zeros := ranks[path.split(".", 2)[2]] - len(a):
            a, b = np.pad(a, ((0, zeros), (0, 0))), np.pad(b, ((0, 0), (0, zeros)))
        yield from pack_branch(f"{path}.lora_a.weight", a, scheme)
        yield from pack_branch(f"{path}.lora_b.weight", b, scheme)
    for table in (EMBEDDING, HEAD):
        if pair := adapter.pairs.get((None, table)):
            a = np.ascontiguousarray(pair.a.T) if table == EMBEDDING else pair.a  # a row for each token
            yield from pack_branch(f"{table}.lora_a.weight", a, scheme)
            yield from pack_branch(f"{table}.lora_b.weight", folded_b(pair), scheme)
    rows = _few_rows(adapter, recipe, foundation)
    for constants in chain(_tables(adapter, recipe, rows), _norms(adapter)):
        if any(base.get(constant.name) != constant.key for constant in constants):
            if adapter.invocation is not None:
                what = activated_with(f"{constants[0].name} of its own")
                raise UnsupportedError(what, where=adapter.path, hint=BRANCHES_ALONE)
            yield from constants
    for place in _affine_places(adapter):
        yield from _affine(place, adapter, foundation)
    for table, of_table in ({**adapter.rows, **rows}).items():
        ids = of_table.ids.view(np.uint8)
        yield Constant.of(f"{table}.rows.ids", "int64", of_table.ids.shape, TENSOR, ids)
        yield from pack_float(f"{table}.rows.weight", of_table.values, is_tensor=False)


def _schemes(recipe: Recipe) -> dict[str, Scheme]:
    return {EMBEDDING: recipe.embedding, HEAD: recipe.head_scheme()}


def _tables(adapter: Adapter, recipe: Recipe, as_rows: Collection[str]) -> Iterator[list[Constant]]:
    for table, scheme in _schemes(recipe).items():
        value = adapter.parameters.get(f"{table}.weight")
        if value is not None and table not in as_rows:
            yield pack_table(f"{table}.weight", value, scheme, is_embedding=table == EMBEDDING)


def _few_rows(adapter: Adapter, recipe: Recipe, foundation: Values) -> dict[str, TokenRows]:
    """The rows of a grown table, if most others are the base's: a copy of the table would take more bytes."""
    found = {}
    for table, scheme in _schemes(recipe).items():
        name, value = f"{table}.weight", adapter.parameters.get(f"{table}.weight")
        if value is None or (None, table) in adapter.pairs:
            continue
        before = foundation.rows(name)
        if before == len(value):  # in the table of its own it keeps its program
            continue
        like_base = pack_table(name, value[:before], scheme, is_embedding=table == EMBEDDING)
        own = np.ones(len(value), bool)
        own[:before] = foundation.rows_differ(like_base)
        if rows := adapter.rows.get(table):
            value = value.copy()
            value[rows.ids] = rows.values
            own[rows.ids] = True
        if 4 * own.sum() <= len(value):
            found[table] = TokenRows(ids=np.flatnonzero(own).astype(np.int64), values=value[own])
    return found


def _norms(adapter: Adapter) -> Iterator[list[Constant]]:
    for name, value in adapter.parameters.items():
        if "norm." in name:
            yield pack_float(name, value, is_tensor=True)


def _affine_places(adapter: Adapter) -> list[Place]:
    """Where the output of a linear is changed by more than a branch."""
    found: dict[Place, None] = {}
    for place, pair in adapter.pairs.items():
        if pair.magnitude is not None or pair.bias is not None:
            found[place] = None
    for name in adapter.parameters:
        if name.endswith("_proj.bias"):
            _, layer, linear = name.removesuffix(".bias").split(".", 2)
            found[int(layer), linear] = None
    return sorted(found, key=lambda place: (-1 if place[0] is None else place[0], place[1]))


def _affine(place: Place, adapter: Adapter, foundation: Values) -> Iterator[Constant]:
    """factor and shift, with which y = base's output + branch becomes factor · y + shift."""
    layer, linear = place
    base = linear if layer is None else f"layers.{adapter.base_layer(layer)}.{linear}"
    path, pair = module_of(place), adapter.pairs.get(place)
    old = new = None
    if foundation.has(f"{base}.bias"):
        rows = adapter.shapes_of(linear)[0]
        old = foundation.floats(f"{base}.bias", rows)
        new = adapter.parameters.get(f"{path}.bias", old)
    shift = np.zeros(adapter.shapes_of(linear)[0], np.float32)
    if pair is not None and pair.magnitude is not None:
        factor = _factor(place, pair, adapter, foundation, base)
        yield from pack_float(f"{path}.factor", factor, is_tensor=False)
        if old is not None and new is not None:
            shift = new - factor * old
    elif old is not None and new is not None:
        shift = new - old
    if pair is not None and pair.bias is not None:
        shift = shift + folded_bias(pair)
    if shift.any():
        yield from pack_float(f"{path}.shift", shift, is_tensor=False)


def _factor(
    place: Place, pair: LoraPair, adapter: Adapter, foundation: Values, base: str
) -> NDArray[np.float32]:
    """By what the magnitudes differ from the lengths of the rows of W + scale · B A, float32 [out].

    W is the base's before it was quantized: the foundation has the squared lengths of its rows. Only for its products
    with B A the quantized weight stands in, where it has no others.
    """
    assert pair.magnitude is not None
    weight = adapter.parameters.get(f"{module_of(place)}.weight")
    exact = weight is not None or not foundation.has(f"{base}.{ROW_NORMS}")
    weight = foundation.linear(base) if weight is None else weight
    squares = None if exact else foundation.floats(f"{base}.{ROW_NORMS}", len(weight)).astype(np.float64)
    b, lengths = folded_b(pair), np.empty(len(weight))
    step = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for first in range(0, len(weight), step):
        block = slice(first, first + step)
        added = (b[block] @ pair.a).astype(np.float64)
        rows = weight[block].astype(np.float64)
        whole = np.square(rows + added).sum(axis=1)
        if squares is not None:
            better = squares[block] + 2 * (rows * added).sum(axis=1) + np.square(added).sum(axis=1)
            whole = np.where(better > 0, better, whole)
        lengths[block] = np.sqrt(whole)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor: NDArray[np.float32] = (pair.magnitude / lengths).astype(np.float32)
    if not np.isfinite(factor).all():
        raise AdapterError(
            f"DoRA: a row of {module_of(place)} is zero, and its magnitude would be divided by its length",
            where=adapter.path,
            hint=AGAIN,
        )
    return factor


def no_program(adapter: Adapter, spec: ModelSpec) -> str | None:
    """What of an adapter the program of a branch beside each linear does not compute, in words. None: it computes all.

    spec: of the base. Norms, heads and embeddings of its own are other constants in the same program.
    """
    pairs = adapter.pairs
    parts = {
        "an activated LoRA (aLoRA), which is on only from certain tokens": adapter.invocation is not None,
        "more tokens than the base": adapter.spec.vocab_size != spec.vocab_size,
        "DoRA": any(pair.magnitude is not None for pair in pairs.values()),
        "trained biases": any(name.endswith("_proj.bias") for name in adapter.parameters),
        "biases beside B": any(pair.bias is not None for pair in pairs.values()),
        "a LoRA on the head": (None, HEAD) in pairs,
        "a LoRA on the embedding": (None, EMBEDDING) in pairs,
        "trained tokens": bool(adapter.rows),
    }
    return next((what for what, is_there in parts.items() if is_there), None)
