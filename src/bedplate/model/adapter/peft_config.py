"""`adapter_config.json` of PEFT, checked. No field is ignored unless it cannot change what the adapter computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.config_fields import ConfigFields, layers_form, readable, saved_form, short
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
INVOCATION = "alora_invocation_tokens"


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
    invocation: the tokens that turn an activated LoRA on. None: it is on from the first token.
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
    invocation: tuple[int, ...] | None


def read_config(data: bytes, where: Path) -> PeftConfig:
    """Check the file's content and take what counts. Raises AdapterError or UnsupportedError, naming the field."""
    fields = ConfigFields(_parse(data, where), where)
    _check_known(fields)
    parameters = fields.names("target_parameters")
    # PEFT saves the targets that it chose itself. With parameters it may have chosen none.
    targets = fields.names_or_pattern("target_modules", default=() if parameters else DEFAULT_TARGETS)
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
        parameters=parameters,
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
        invocation=_invocation(fields),
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


def _check_known(fields: ConfigFields) -> None:
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


def _check_together(config: PeftConfig, fields: ConfigFields) -> None:
    """What PEFT does not take together."""
    start = fields.get("init_lora_weights", True)
    variants = {
        "use_bdlora": config.block_diagonal is not None,
        "velora_config": not _is_off(fields.get("velora_config", None)),
        "monteclora_config": not _is_off(fields.get("monteclora_config", None)),
        f"init_lora_weights = {short(start)}": start == "mica",
    }
    not_beside = {
        "use_dora": {"lora_bias": config.lora_bias, **variants} if config.dora else {},
        INVOCATION: {
            "use_dora": config.dora,
            "target_parameters": bool(config.parameters),
            **variants,
        }
        if config.invocation
        else {},
    }
    for name, others in not_beside.items():
        if beside := [other for other, is_set in others.items() if is_set]:
            fields.fail(f"{name} and {beside[0]} cannot stand together: PEFT refuses it")
    if config.lora_bias and not isinstance(start, bool):
        fields.fail(
            f"lora_bias and init_lora_weights = {short(start)} cannot stand together: PEFT refuses it"
        )


def _invocation(fields: ConfigFields) -> tuple[int, ...] | None:
    value = fields.get(INVOCATION, None)
    if _is_off(value):  # of no tokens, it is on everywhere, as in PEFT
        return None
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        fields.fail(f"{INVOCATION} must be a list of token ids, got {short(value)}")
    kind = fields.get("task_type", None)
    if kind != "CAUSAL_LM":
        raise UnsupportedError(
            f"{INVOCATION} is set and task_type = {short(kind)}: PEFT never turns such an adapter on",
            where=fields.where,
            hint='if it was trained to continue text, set task_type to "CAUSAL_LM"',
        )
    return tuple(value)


def _saved(fields: ConfigFields) -> tuple[str, ...]:
    names = fields.names("modules_to_save")
    if "" in names:
        fields.fail("modules_to_save holds an empty name")
    for name in names:
        fields.check_pattern("modules_to_save", saved_form(name))
    return names


def _tokens(fields: ConfigFields) -> dict[str, tuple[int, ...]]:
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


def _replication(fields: ConfigFields) -> tuple[tuple[int, int], ...] | None:
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


def _starts_at_zero(fields: ConfigFields) -> bool:
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


def _block_diagonal(fields: ConfigFields) -> BlockDiagonal | None:
    value = fields.get("use_bdlora", None)
    if value is None or value is False:
        return None
    if not isinstance(value, dict):
        fields.fail(f"use_bdlora must be an object, got {short(value)}")
    inner = ConfigFields(value, fields.where, within="use_bdlora.")
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
