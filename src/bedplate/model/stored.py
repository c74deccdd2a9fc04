"""Where a model's own files hold each parameter, and how they hold it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bedplate.model.families import family_of
from bedplate.model.rotary_order import turned_heads
from bedplate.spec import ModelSpec, linear_shapes, parameter_shapes

_NORMS = (
    "norm",
    "attention_norm",
    "attention_output_norm",
    "mlp_norm",
    "mlp_output_norm",
    "q_norm",
    "k_norm",
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a module of the files: `count` of them from `first` on, which are those of `linear`."""

    linear: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter is.

    name: of the tensor in the files.  first, count: its rows there.
    heads: 0, or the parameter's rows are those of so many heads and stand in the files' order.
    offset: to be added to the values.
    """

    name: str
    first: int
    count: int
    heads: int
    offset: float


def stored_linears(spec: ModelSpec) -> dict[str, tuple[Rows, ...]]:
    """The linears of a layer as the files have them, in the order of the model → the rows of ours in them."""
    shapes, modules = linear_shapes(spec), family_of(spec).modules
    of_ours = {part: (module, parts) for module, parts in modules.items() for part in parts}
    found: dict[str, tuple[Rows, ...]] = {}
    for linear in shapes:
        module, parts = of_ours.get(linear, (linear, (linear,)))
        found[module] = tuple(_rows([(part, shapes[part][0]) for part in parts]))
    return found


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Where each parameter is, by its name."""
    family = family_of(spec)
    renamed = {parts[0]: module for module, parts in family.modules.items()}
    place = {rows.linear: (module, rows) for module, parts in stored_linears(spec).items() for rows in parts}
    found = {}
    for name, shape in parameter_shapes(spec).items():
        path, _, leaf = name.rpartition(".")
        prefix, module = _in_layer(path)
        if module in place:
            stored, rows = place[module]
            first = rows.first
        else:
            stored, first = renamed.get(module, module), 0
        is_norm = module.rpartition(".")[2] in _NORMS
        found[name] = Source(
            name=f"{prefix}{stored}.{leaf}",
            first=first,
            count=shape[0],
            heads=turned_heads(module, spec),
            offset=family.norm_offset if is_norm and leaf == "weight" else 0.0,
        )
    return found


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the files, by its name there."""
    shapes: dict[str, tuple[int, ...]] = {}
    ours, found = parameter_shapes(spec), sources(spec)
    for name, source in found.items():
        _, *rest = ours[name]
        rows = max(source.first + source.count, shapes.get(source.name, (0,))[0])
        shapes[source.name] = (rows, *rest)
    return shapes


def _in_layer(path: str) -> tuple[str, str]:
    """`layers.3.` and the module's path in the layer; nothing and the path of a module that is in none."""
    if not path.startswith("layers."):
        return "", path
    _, index, module = path.split(".", 2)
    return f"layers.{index}.", module


def _rows(parts: list[tuple[str, int]]) -> Iterator[Rows]:
    first = 0
    for linear, count in parts:
        yield Rows(linear=linear, first=first, count=count)
        first += count
