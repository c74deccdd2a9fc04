"""RoPE as a config.json describes it, in every spelling that transformers reads."""

from __future__ import annotations

from typing import Any

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields, shown
from bedplate.spec import Llama3Scaling, RopeSpec

_TYPES = ("default", "llama3")
# What a section may hold; `type` is the older name of `rope_type`.
_KNOWN = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
_NEVER = "use a model without this field: bedplate never ignores what changes the rotation"
# Positions count to here in the native runtime and in its files.
MOST_POSITIONS = 2**31 - 1


def rope_spec(config: Fields, *, max_positions: int) -> RopeSpec:
    """The rotary embedding of a config whose layers all have the same.

    transformers 5 writes `rope_parameters`; earlier versions write `rope_scaling` and a `rope_theta` beside it. Where
    `rope_scaling` is there and not empty, `rope_parameters` does not count. Inside the one that counts, theta and the
    partial factor win over those of the top level; of the original length, the top level wins.
    Raises UnsupportedError or CheckpointError, naming the field.
    """
    name = "rope_scaling" if config.section("rope_scaling") else "rope_parameters"
    section = {**config.section(name)}
    for field in ("rope_theta", "partial_rotary_factor"):
        if section.get(field) is None:
            section[field] = config.get(field)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        section["original_max_position_embeddings"] = original
    fields = Fields(section, config.where)
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in _TYPES:
        raise UnsupportedError(
            f"RoPE of the type {shown(kind)} is not supported ({name})",
            where=config.where,
            hint=f"supported types: {', '.join(_TYPES)}",
        )
    _refuse_others(fields, name, kind)
    theta = fields.number("rope_theta", default=10000.0)
    return RopeSpec(theta=theta, scaling=None if kind == "default" else _llama3(fields, max_positions))


def _refuse_others(fields: Fields, name: str, kind: str) -> None:
    """UnsupportedError: a section for each kind of layer, or a field that bedplate does not compute."""
    for field, value in sorted(fields.values.items()):
        # Type `default` has no parameters but theta: what else stands beside it is read by nobody.
        unread = kind == "llama3" and field not in _KNOWN
        if unread or isinstance(value, dict) or (field == "partial_rotary_factor" and not _whole(value)):
            raise UnsupportedError(
                f"{field} = {shown(value)} in {name} is not supported for RoPE of the type {kind!r}",
                where=fields.where,
                hint=_NEVER,
            )


def _whole(partial_rotary_factor: Any) -> bool:
    return partial_rotary_factor is None or (
        type(partial_rotary_factor) in (int, float) and partial_rotary_factor == 1
    )


def _llama3(fields: Fields, max_positions: int) -> Llama3Scaling:
    low, high = (fields.number(f"{end}_freq_factor") for end in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            f"low_freq_factor {low} is not below high_freq_factor {high}",
            where=fields.where,
            hint="correct these fields, or download the file again",
        )
    return Llama3Scaling(
        factor=fields.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=fields.count(
            "original_max_position_embeddings", default=max_positions, most=MOST_POSITIONS
        ),
    )
