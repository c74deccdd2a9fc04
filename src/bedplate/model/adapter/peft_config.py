"""`adapter_config.json` of PEFT, checked. No field is ignored unless it cannot change what the adapter computes."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.peft_fields import (
    CHANGES_BASE,
    KEEPS_BASE,
    NO_EFFECT,
    REFUSED,
    SET_BY_EMPTY,
    USED,
)
from bedplate.model.adapter.types import AGAIN, EMBEDDING

CONFIG = "adapter_config.json"
MERGE = "merge the adapter into the base model, or train without this option"
# PEFT's own defaults for what a config leaves out.
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8
DEFAULT_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class BlockDiagonal:
    """BD-LoRA: A or B of some linears holds only the blocks of a block-diagonal matrix.

    a, b: the linears whose path contains one of these have such an A or B.
    strict: every adapted linear must be among them.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    blocks: int
    strict: bool


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields that say what an adapter computes.

    rank_of, alpha_of: by pattern, for what differs from `rank` and `alpha`; the first that matches counts.
    targets, excluded: names (suffixes of paths), or one pattern.
    parameters: suffixes of paths of parameters (`q_proj.weight`).
    layers: None stands for all.
    dora: each adapted linear has magnitudes. lora_bias: each has a bias beside B.
    saved: ends of the paths of modules that are trained in full.
    tokens: whose rows are trained, by the end of the path of the embedding or the head.
    replication: the runs of layers, from one up to another, that the model is made of. None: it is as it is.
    keeps_tied: what is done to the embedding is done to a head that shares its weight.
    starts_at_zero: what the file holds no tensors for, PEFT starts with B·A = 0.
    """

    rank: int
    alpha: float
    by_square_root: bool
    rank_of: Mapping[str, int]
    alpha_of: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    parameters: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    block_diagonal: BlockDiagonal | None
    dora: bool
    lora_bias: bool
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    replication: tuple[tuple[int, int], ...] | None
    keeps_tied: bool
    starts_at_zero: bool


def read_config(data: bytes, where: Path) -> PeftConfig:
    """Check the file's content and take what counts. Raises AdapterError or UnsupportedError, naming the field."""
    fields = _Fields(_parse(data, where), where)
    _check_known(fields)
    targets = fields.names_or_pattern("target_modules", default=DEFAULT_TARGETS)
    layers = fields.integers("layers_to_transform")
    layers_pattern = fields.names("layers_pattern")
    for pattern in layers_pattern:
        fields.check_pattern("layers_pattern", layers_form(pattern))
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        fields.fail(
            "target_modules is one pattern, so layers_to_transform and layers_pattern cannot stand beside it"
        )
    if layers_pattern and layers is None:
        fields.fail("layers_pattern stands there without layers_to_transform")
    config = PeftConfig(
        rank=fields.rank("r", fields.get("r", DEFAULT_RANK)),
        alpha=fields.number("lora_alpha", fields.get("lora_alpha", DEFAULT_ALPHA)),
        by_square_root=fields.flag("use_rslora"),
        rank_of={
            pattern: fields.rank(name, value) for name, pattern, value in fields.patterns("rank_pattern")
        },
        alpha_of={
            pattern: fields.number(name, value) for name, pattern, value in fields.patterns("alpha_pattern")
        },
        targets=targets,
        excluded=fields.names_or_pattern("exclude_modules", default=()),
        parameters=fields.names("target_parameters"),
        layers=layers or None,
        layers_pattern=layers_pattern,
        block_diagonal=_block_diagonal(fields),
        dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        saved=_saved(fields),
        tokens=_tokens(fields),
        replication=_replication(fields),
        keeps_tied=fields.flag("ensure_weight_tying"),
        starts_at_zero=_starts_at_zero(fields),
    )
    _check_together(config, fields)
    return config


def _parse(data: bytes, where: Path) -> dict[str, Any]:
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"is not JSON: {error}", where=where, hint=AGAIN) from None
    if not isinstance(config, dict):
        raise AdapterError("is not a JSON object", where=where, hint=AGAIN)
    return config


def _check_known(fields: _Fields) -> None:
    kind = fields.get("peft_type", None)
    if kind != "LORA":
        raise UnsupportedError(
            f"peft_type = {short(kind)} is not supported", where=fields.where, hint="supported: LORA"
        )
    for field, value in fields.items():
        if field in USED or field in NO_EFFECT:
            continue
        if _is_off(value) and not (field in SET_BY_EMPTY and value == {}):
            continue
        meaning = f" ({REFUSED[field]})" if field in REFUSED else ""
        unknown = "bedplate does not know this field: if it has no effect at inference, remove it"
        raise UnsupportedError(
            f"{readable(field)} = {short(value)}{meaning} is not supported",
            where=fields.where,
            hint=MERGE if field in REFUSED else unknown,
        )
    # The tensors say whether there are trained biases.
    bias = fields.get("bias", None)
    if not _is_off(bias) and bias not in ("none", "all", "lora_only"):
        raise UnsupportedError(
            f"bias = {short(bias)} is not supported",
            where=fields.where,
            hint="supported: none",
        )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _check_together(config: PeftConfig, fields: _Fields) -> None:
    """What PEFT does not take together."""
    start = fields.get("init_lora_weights", True)
    others = {
        "lora_bias": config.lora_bias,
        "use_bdlora": config.block_diagonal is not None,
        "velora_config": not _is_off(fields.get("velora_config", None)),
        "monteclora_config": not _is_off(fields.get("monteclora_config", None)),
        f"init_lora_weights = {short(start)}": start == "mica",
    }
    if beside := [name for name, is_set in others.items() if is_set and config.dora]:
        fields.fail(f"use_dora and {beside[0]} cannot stand together: PEFT refuses it")
    if config.lora_bias and not isinstance(start, bool):
        fields.fail(
            f"lora_bias and init_lora_weights = {short(start)} cannot stand together: PEFT refuses it"
        )


def _saved(fields: _Fields) -> tuple[str, ...]:
    names = fields.names("modules_to_save")
    if "" in names:
        fields.fail("modules_to_save holds an empty name")
    return names


def _tokens(fields: _Fields) -> dict[str, tuple[int, ...]]:
    value = fields.get("trainable_token_indices", None)
    if value in (None, False, "", {}):
        return {}
    of_names = value if isinstance(value, dict) else {EMBEDDING: value}
    found = {}
    for name, ids in of_names.items():
        # A list: PEFT would count booleans as 0 and 1.
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            fields.fail(f"trainable_token_indices must be lists of token ids, got {short(ids)}")
        if len(set(ids)) < len(ids):
            fields.fail(f"trainable_token_indices names a token twice: {short(ids)}")
        found[name] = tuple(ids)
    return found


def _replication(fields: _Fields) -> tuple[tuple[int, int], ...] | None:
    value = fields.get("layer_replication", None)
    if _is_off(value):
        return None
    if not isinstance(value, list) or not all(
        isinstance(run, list)
        and len(run) == 2
        and all(type(at) is int for at in run)
        and 0 <= run[0] < run[1] < 2**20
        for run in value
    ):
        fields.fail(f"layer_replication must be a list of ranges of layers, got {short(value)}")
    return tuple((first, behind) for first, behind in value)


def _starts_at_zero(fields: _Fields) -> bool:
    start = fields.get("init_lora_weights", True)
    if start is None or isinstance(start, bool):
        return bool(start)
    if isinstance(start, str) and start.lower() in KEEPS_BASE:
        return True
    name = f"init_lora_weights = {short(start)}"
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"{name} is not supported: training began by changing the base model's weights",
            where=fields.where,
            hint="convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    raise UnsupportedError(
        f"{name} is not known: it may have changed the base model's weights",
        where=fields.where,
        hint=f"known: true, false, {', '.join(KEEPS_BASE)}",
    )


def _block_diagonal(fields: _Fields) -> BlockDiagonal | None:
    value = fields.get("use_bdlora", None)
    if value is None or value is False:
        return None
    if not isinstance(value, dict):
        fields.fail(f"use_bdlora must be an object, got {short(value)}")
    inner = _Fields(value, fields.where, within="use_bdlora.")
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if unknown := sorted(value.keys() - known):
        raise UnsupportedError(
            f"use_bdlora.{readable(unknown[0])} is not supported", where=fields.where, hint=MERGE
        )
    return BlockDiagonal(
        a=inner.names("target_modules_bd_a"),
        b=inner.names("target_modules_bd_b"),
        blocks=inner.rank("nblocks", inner.get("nblocks", 1)),
        strict=inner.flag("match_strict", default=True),
    )


class _Fields:
    """Fields by name, with checks of their types. Each raises AdapterError."""

    def __init__(self, values: Mapping[str, Any], where: Path, *, within: str = "") -> None:
        self._values, self.where, self._within = values, where, within

    def get(self, field: str, default: Any) -> Any:
        return self._values.get(field, default)

    def items(self) -> list[tuple[str, Any]]:
        return sorted(self._values.items())

    def fail(self, what: str) -> NoReturn:
        raise AdapterError(what, where=self.where, hint=AGAIN)

    def flag(self, field: str, *, default: bool = False) -> bool:
        value = self.get(field, default)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{self._within}{field} must be true or false, got {short(value)}")
        return bool(value)

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 2**31:
            self.fail(f"{self._within}{name} must be a positive integer, got {short(value)}")
        return int(value)

    def number(self, name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be beyond any float, and then isfinite raises.
        if not is_number or abs(value) > 1e300 or math.isnan(value):
            self.fail(f"{self._within}{name} must be a number, got {short(value)}")
        return float(value)

    def names(self, field: str) -> tuple[str, ...]:
        """A list of names, or one."""
        value = self.get(field, None)
        value = [value] if isinstance(value, str) and value else value or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.fail(f"{self._within}{field} must be a list of names, got {short(value)}")
        return tuple(value)

    def names_or_pattern(self, field: str, *, default: tuple[str, ...]) -> str | tuple[str, ...]:
        """One string is a pattern. `default` stands for None."""
        value = self.get(field, None)
        if isinstance(value, str):
            self.check_pattern(field, value)
            return value
        return default if value is None else self.names(field)

    def integers(self, field: str) -> tuple[int, ...] | None:
        value = self.get(field, None)
        if value is None:
            return None
        value = [value] if type(value) is int else value
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            self.fail(f"{field} must be a list of integers, got {short(value)}")
        return tuple(value)

    def patterns(self, field: str) -> Iterator[tuple[str, str, Any]]:
        """(its name in an error, pattern, value), in the order of the file."""
        value = self.get(field, None) or {}
        if not isinstance(value, dict):
            self.fail(f"{field} must be an object, got {short(value)}")
        for pattern, of_pattern in value.items():
            self.check_pattern(field, pattern_form(pattern))
            yield f"{field}[{short(pattern)}]", pattern, of_pattern

    def check_pattern(self, field: str, pattern: str) -> None:
        try:
            with warnings.catch_warnings():  # of what another Python may read otherwise
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            self.fail(f"{field} holds {short(pattern)}, which is not a regular expression: {error}")


def pattern_form(pattern: str) -> str:
    """How PEFT matches the names in rank_pattern and alpha_pattern, from the start of a path."""
    return rf"(.*\.)?({pattern})$"


def layers_form(pattern: str) -> str:
    """How PEFT finds the number of a layer behind a name in layers_pattern, from the start of a path."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def short(value: Any) -> str:
    """A value of the file in an error, on one line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


def readable(name: str) -> str:
    """A name of the file in an error: what cannot be printed is escaped."""
    return name.encode("ascii", "backslashreplace").decode() if not name.isprintable() else name
