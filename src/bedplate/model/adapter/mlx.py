"""A folder of MLX-LM: `adapters.safetensors`, with A and B transposed, and the options of its training run."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.config_fields import short
from bedplate.model.adapter.peft_config import CONFIG, MERGE
from bedplate.model.adapter.peft_keys import Half, Key, meaning_of
from bedplate.model.adapter.peft_targets import Target
from bedplate.model.adapter.peft_weights import make_pair, pair_up
from bedplate.model.adapter.tensors import parse_safetensors, read_file
from bedplate.model.adapter.types import AGAIN, Place, RawAdapter, module_of
from bedplate.spec import ModelSpec

WEIGHTS = "adapters.safetensors"
_HALF = re.compile(r"^(?:language_model\.)?(?:model\.)?layers\.([0-9]{1,6})\.(.+)\.(lora_a|lora_b|m)$")
_HALVES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
_PARAMETERS = ("rank", "scale", "dropout", "keys", "alpha")
_NOT_WHOLE = "use the config and the weights of one adapter"


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is one of MLX-LM."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx(path: Path, config: Mapping[str, Any], config_data: bytes, spec: ModelSpec) -> RawAdapter:
    """Read a folder whose config is one of MLX-LM's. Raises AdapterError or UnsupportedError.

    Only `fine_tune_type`, `lora_parameters` and the number of layers say what is computed: all else is of training.
    """
    where, weights = path / CONFIG, path / WEIGHTS
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        meaning = " (weights of the base model, trained in full)" if kind == "full" else ""
        raise UnsupportedError(
            f"fine_tune_type = {short(kind)}{meaning} is not supported", where=where, hint=MERGE
        )
    rank, scale, keys = _parameters(config.get("lora_parameters"), where)
    data = read_file(weights)
    halves = pair_up(parse_safetensors(data, weights), weights, _parse)
    _check_magnitudes(halves, kind == "dora", where)
    _check_layers(halves, config, spec, where)
    if keys is not None:
        _check_keys(halves, keys, where)
    target = Target(rank=rank, rank_from="lora_parameters.rank", scale=scale, blocks_of=None)
    digest = hashlib.sha256(hashlib.sha256(config_data).digest() + hashlib.sha256(data).digest())
    return RawAdapter(
        path=path,
        format="mlx",
        weights=weights,
        pairs={
            # Of a vector, the transpose is itself.
            place: make_pair(place, {half: value.T for half, value in of_linear.items()}, target, 1, weights)
            for place, of_linear in halves.items()
        },
        alpha=scale * rank,
        fingerprint=digest.hexdigest(),
    )


def _parse(name: str) -> Key:
    if found := _HALF.match(name):
        return Half(layer=int(found[1]), linear=found[2], half=_HALVES[found[3]])
    return meaning_of(name)


def _check_magnitudes(halves: Mapping[Place, Mapping[str, Any]], wanted: bool, where: Path) -> None:
    for place, of_linear in halves.items():
        if ("magnitude" in of_linear) != wanted:
            raise AdapterError(
                f'fine_tune_type is "{"dora" if wanted else "lora"}", but the weights hold '
                f"{'no' if wanted else 'a'} magnitude (.m) of {module_of(place)}",
                where=where,
                hint=_NOT_WHOLE,
            )


def _parameters(value: Any, where: Path) -> tuple[int, float, frozenset[str] | None]:
    """Rank, factor, and the linears that may be adapted (None: any)."""
    if not isinstance(value, dict):
        raise AdapterError(f"lora_parameters is {short(value)}, not an object", where=where, hint=AGAIN)
    for field in value:
        if field not in _PARAMETERS:
            hint = "bedplate does not know this field: if it has no effect at inference, remove it"
            raise UnsupportedError(f"lora_parameters.{field} is not supported", where=where, hint=hint)
    fields: dict[str, Any] = value
    rank, scale, keys, alpha = (
        fields.get("rank"),
        fields.get("scale"),
        fields.get("keys"),
        fields.get("alpha"),
    )
    if type(rank) is not int or rank < 1:
        raise AdapterError(
            f"lora_parameters.rank must be a positive integer, got {short(rank)}", where=where, hint=AGAIN
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise AdapterError(
            f"lora_parameters.scale must be a number, got {short(scale)}", where=where, hint=AGAIN
        )
    if alpha is not None and alpha != rank:
        raise UnsupportedError(
            f"lora_parameters holds alpha = {short(alpha)} beside scale = {scale}: older versions of MLX-LM used "
            "scale · alpha / rank as the factor, newer ones use scale",
            where=where,
            hint="write the factor that the adapter was trained with as scale, and remove alpha",
        )
    if keys is None:
        return rank, float(scale), None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise AdapterError(
            f"lora_parameters.keys must be a list of names, got {short(keys)}", where=where, hint=AGAIN
        )
    return rank, float(scale), frozenset(keys)


def _check_layers(
    places: Mapping[Place, Any], config: Mapping[str, Any], spec: ModelSpec, where: Path
) -> None:
    """Only the last layers are adapted; MLX-LM would drop tensors of others without a word."""
    field = "num_layers" if "num_layers" in config else "lora_layers"
    count = config.get(field)
    if type(count) is not int:
        raise AdapterError(f"{field} must be an integer, got {short(count)}", where=where, hint=AGAIN)
    first = max(0, spec.n_layers - count) if count > 0 else 0
    if below := sorted(layer for layer, _ in places if layer is not None and layer < first):
        raise AdapterError(
            f"{field} = {count} adapts layers {first} to {spec.n_layers - 1} of this model, "
            f"but the weights hold tensors of layer {below[0]}",
            where=where,
            hint=f"{_NOT_WHOLE}, and add it to the model that it was trained on",
        )


def _check_keys(places: Mapping[Place, Any], keys: frozenset[str], where: Path) -> None:
    for layer, linear in places:
        if keys.isdisjoint((linear, f"model.layers.{layer}.{linear}")):
            raise AdapterError(
                f"the weights hold tensors of {linear}, which lora_parameters.keys does not name",
                where=where,
                hint=_NOT_WHOLE,
            )
