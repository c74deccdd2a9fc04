"""RoPE as a config.json describes it, in every spelling that transformers reads → its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields, shown
from bedplate.spec import LongRope, RopeTable, RotaryRows

_Floats = NDArray[np.float32]

# What a section may hold; `type` is the older name of `rope_type`. What a type does not use, transformers ignores.
_KNOWN = {
    *(
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
    ),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
_NEVER = "use a model without this field: bedplate never ignores what changes the rotation"
_CORRECT = "correct these fields, or download the file again"
# Positions count to here in the native runtime and in its files.
MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Rope:
    """tables: by kind of layer.  rows: which rows of a head turn in the model's files."""

    tables: Mapping[str, RopeTable]
    rows: RotaryRows


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How transformers reads RoPE of a family.

    partial: the family turns only the first rows of a head, by `partial_rotary_factor`.
    interleaved: neighbouring rows turn together.
    types: those that it takes, by their names in a config.  also: what else a section may hold.
    """

    partial: bool = False
    interleaved: bool = False
    types: Mapping[str, str] | None = None
    also: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A section that says all of one rotary embedding."""

    fields: Fields
    head_dim: int
    max_positions: int
    rules: Rules

    @property
    def name(self) -> str:
        return str(self.fields.inside)

    @property
    def dim(self) -> int:
        """The rows that turn, as transformers counts them: an odd number is one pair more than its half."""
        factor = self.fields.number("partial_rotary_factor", default=1.0)
        return int(self.head_dim * factor)

    def inverse(self, base: float) -> _Floats:
        """RoFormer's base^(-2i / dim), in the float32 operations of transformers."""
        return np.float32(1) / _powers(base, self.dim)


def read_rope(
    config: Fields, kinds: Collection[str], *, head_dim: int, max_positions: int, rules: Rules
) -> Rope:
    """The rotary embedding of a config whose layers all have the same.

    transformers 5 writes `rope_parameters`; earlier versions write `rope_scaling` and a `rope_theta` beside it. Where
    `rope_scaling` is there and not empty, `rope_parameters` does not count. Inside the one that counts, theta and the
    partial factor win over those of the top level; of the original length, the top level wins.
    Raises UnsupportedError or CheckpointError, naming the field.
    """
    name = "rope_scaling" if config.section("rope_scaling") else "rope_parameters"
    values = {**config.section(name)}
    if values.get("rope_theta") is None and config.get("rope_theta") is not None:
        values["rope_theta"] = config.number("rope_theta")
    if values.get("partial_rotary_factor") is None:
        values["partial_rotary_factor"] = config.get("partial_rotary_factor")
    original = config.get("original_max_position_embeddings")
    if original is not None:
        values["original_max_position_embeddings"] = original
    section = _Section(
        fields=Fields(values, config.where, name),
        head_dim=head_dim,
        max_positions=max_positions,
        rules=rules,
    )
    table, rows = _table(section)
    return Rope(tables=dict.fromkeys(kinds, table), rows=rows)


def read_rope_by_kind(
    config: Fields, thetas: Mapping[str, float], *, head_dim: int, max_positions: int
) -> Rope:
    """The rotary embeddings of a config that has one for each kind of layer.

    thetas: of each kind of layer, where its section in `rope_parameters` has none. `rope_scaling`, which earlier
    versions write, is of the layers that see everything. Raises UnsupportedError or CheckpointError.
    """
    sections = config.section("rope_parameters")
    if config.get("rope_parameters") is None:
        # As in transformers: the type that stands here counts before the older name of the type in rope_scaling.
        sections = {kind: {"rope_type": "default"} for kind in thetas}
    for field, value in sections.items():
        if field not in thetas:
            raise UnsupportedError(
                f"{field} = {shown(value)} in rope_parameters is not supported beside the kinds of layers",
                where=config.where,
                hint=_NEVER,
            )
    tables = {}
    for kind, theta in thetas.items():
        name = f"rope_parameters.{kind}"
        values = {**Fields(sections, config.where).section(kind)}
        if kind == "full_attention" and (scaling := config.section("rope_scaling")):
            name, values = f"{name} with rope_scaling", values | scaling
        if values.get("truncate") not in (None, True):
            raise UnsupportedError(
                f"truncate = {shown(values['truncate'])} in {name} is not supported: transformers ignores it",
                where=config.where,
                hint=_NEVER,
            )
        values = {"rope_theta": theta, "partial_rotary_factor": config.get("partial_rotary_factor"), **values}
        section = _Section(
            fields=Fields(values, config.where, name),
            head_dim=head_dim,
            max_positions=max_positions,
            rules=Rules(),
        )
        tables[kind], _ = _table(section)
    return Rope(tables=tables, rows=RotaryRows(width=head_dim, interleaved=False))


def _table(section: _Section) -> tuple[RopeTable, RotaryRows]:
    fields = section.fields
    kind = fields.get("rope_type") if "rope_type" in fields.values else fields.values.get("type", "default")
    known = section.rules.types or {name: name for name in _TYPES}
    if type(kind) is not str or kind not in known:
        raise UnsupportedError(
            f"RoPE of the type {shown(kind)} is not supported ({section.name})",
            where=fields.where,
            hint=f"supported types: {', '.join(known)}",
        )
    kind = known[kind]
    _refuse_others(section, kind)
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            frequencies, scale, long = _TYPES[kind](section)
    except (ArithmeticError, ValueError):
        raise CheckpointError(
            f"the numbers in {section.name} give no RoPE of the type {kind!r}",
            where=fields.where,
            hint=_CORRECT,
        ) from None
    turning = len(frequencies)
    if not 1 <= turning <= section.head_dim // 2 or (
        turning < section.head_dim // 2 and not section.rules.partial
    ):
        raise UnsupportedError(
            f"partial_rotary_factor = {shown(fields.get('partial_rotary_factor'))} is not supported: it turns "
            f"{2 * turning} rows of heads of {section.head_dim} ({section.name})",
            where=fields.where,
            hint=_NEVER,
        )
    still = (0.0,) * (section.head_dim // 2 - turning)
    table = RopeTable(
        frequencies=(*map(float, frequencies), *still),
        scale=scale,
        long=long and LongRope(frequencies=(*long.frequencies, *still), above=long.above),
    )
    return table, RotaryRows(width=2 * turning, interleaved=section.rules.interleaved)


def _refuse_others(section: _Section, kind: str) -> None:
    """UnsupportedError: a section for each kind of layer, or a field that bedplate does not compute."""
    for field, value in sorted(section.fields.values.items()):
        # Type `default` has no parameters but theta: what else stands beside it is read by nobody.
        unread = kind != "default" and field not in _KNOWN and field not in section.rules.also
        partial = field == "partial_rotary_factor" and kind == "default" and not section.rules.partial
        if unread or isinstance(value, dict) or (partial and not _whole(value)):
            raise UnsupportedError(
                f"{field} = {shown(value)} in {section.name} is not supported for RoPE of the type {kind!r}",
                where=section.fields.where,
                hint=_NEVER,
            )


def _whole(partial_rotary_factor: Any) -> bool:
    return partial_rotary_factor is None or (
        type(partial_rotary_factor) in (int, float) and partial_rotary_factor == 1
    )


# Frequencies [dim / 2] of sequences of any length or of short ones, the factor of cos and sin, and the frequencies of
# longer sequences.
_Computed = tuple[_Floats, float, LongRope | None]


def _default(section: _Section) -> _Computed:
    return section.inverse(_theta(section)), 1.0, None


def _linear(section: _Section) -> _Computed:
    return section.inverse(_theta(section)) / np.float32(section.fields.number("factor")), 1.0, None


def _dynamic(section: _Section) -> _Computed:
    """The frequencies of sequences that the model has positions for; a longer one is never computed."""
    factor, dim = section.fields.number("factor"), section.dim
    stretched = (factor * section.max_positions / section.max_positions) - (factor - 1)
    base: float = _theta(section) * stretched ** (dim / (dim - 2))
    return section.inverse(base), 1.0, None


def _llama3(section: _Section) -> _Computed:
    fields = section.fields
    low, high = (fields.number(f"{end}_freq_factor") for end in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            f"low_freq_factor {low} is not below high_freq_factor {high} in {section.name}",
            where=fields.where,
            hint=_CORRECT,
        )
    inverse, factor, original = (
        section.inverse(_theta(section)),
        np.float32(fields.number("factor")),
        _original(section),
    )
    wavelengths = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    stretched = np.where(wavelengths > original / low, inverse / factor, blended)
    return np.where(wavelengths < original / high, inverse, stretched), 1.0, None


def _yarn(section: _Section) -> _Computed:
    fields, dim, theta, original = section.fields, section.dim, _theta(section), _original(section)
    # transformers takes null for the factor, but no section without it.
    ratio = section.max_positions / original if "factor" in fields.values else None
    factor = fields.number("factor", default=ratio)
    fast, slow = fields.number("beta_fast", default=32), fields.number("beta_slow", default=1)

    def at(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = at(fast), at(slow)
    if fields.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    kept = 1 - ramp
    powers = _powers(theta, dim)
    stretched = np.float32(1) / (np.float32(factor) * powers)
    return stretched * (1 - kept) + np.float32(1) / powers * kept, _yarn_scale(fields, factor), None


def _yarn_scale(fields: Fields, factor: float) -> float:
    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if fields.get("attention_factor") is not None:
        return fields.number("attention_factor")
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        return grown(fields.number("mscale")) / grown(fields.number("mscale_all_dim"))
    return grown(1.0)


def _longrope(section: _Section) -> _Computed:
    fields, original = section.fields, _original(section)
    powers = _powers(_theta(section), section.dim)
    short, long = (
        np.float32(1) / (np.array(fields.numbers(f"{length}_factor", len(powers)), np.float32) * powers)
        for length in ("short", "long")
    )
    factor = fields.number("factor", default=section.max_positions / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return (
        short,
        fields.number("attention_factor", default=scale),
        LongRope(frequencies=tuple(map(float, long)), above=original),
    )


def _proportional(section: _Section) -> _Computed:
    """All pairs of a head stand as if all turned, and the last of them do not."""
    fields, half = section.fields, section.head_dim // 2
    turning = int(fields.number("partial_rotary_factor", default=1.0) * section.head_dim // 2)
    frequencies = np.float32(1) / _powers(_theta(section), section.head_dim)
    frequencies[turning:] = 0
    return frequencies[:half] / np.float32(fields.number("factor", default=1.0)), 1.0, None


_TYPES: dict[str, Callable[[_Section], _Computed]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def _theta(section: _Section) -> float:
    return section.fields.number("rope_theta")


def _original(section: _Section) -> int:
    name = "original_max_position_embeddings"
    return section.fields.count(name, default=section.max_positions, most=MOST_POSITIONS)


def _powers(base: float, dim: int) -> _Floats:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # In float64 and rounded once: torch's own power is as near as this to the true one.
    return (np.float64(np.float32(base)) ** exponents.astype(np.float64)).astype(np.float32)
