"""`adapter_model.safetensors` of PEFT → A and B of each linear."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError
from bedplate.model.adapter.peft_config import CONFIG, rank_and_alpha, read_config
from bedplate.model.adapter.tensors import parse_safetensors, read_file
from bedplate.model.adapter.types import AGAIN, LoraPair, RawAdapter
from bedplate.model.spec import ModelSpec

WEIGHTS = "adapter_model.safetensors"
_LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight$")


def read_peft(path: Path, spec: ModelSpec) -> RawAdapter:
    """Read a folder as PEFT saves it. Raises AdapterError or UnsupportedError."""
    config_data = read_file(path / CONFIG)
    config = read_config(config_data, path / CONFIG)
    rank, alpha = rank_and_alpha(config, path / CONFIG)
    hint = "an adapter saved as .bin can be saved again with PEFT's save_pretrained"
    data = read_file(path / WEIGHTS, hint=hint)
    pairs = _pairs(parse_safetensors(data, path / WEIGHTS), rank, alpha / rank, path / WEIGHTS)
    if not pairs:
        raise AdapterError("it adapts nothing: there are no tensors in it", where=path / WEIGHTS, hint=AGAIN)
    _check_targets(config.get("target_modules"), {linear for _, linear in pairs}, path / CONFIG)
    digest = hashlib.sha256(hashlib.sha256(config_data).digest() + hashlib.sha256(data).digest())
    return RawAdapter(
        path=path,
        format="peft",
        weights=path / WEIGHTS,
        pairs=pairs,
        alpha=alpha,
        fingerprint=digest.hexdigest(),
    )


def _pairs(
    tensors: Mapping[str, NDArray[np.float32]], rank: int, scale: float, where: Path
) -> dict[tuple[int, str], LoraPair]:
    halves = _sort_tensors(tensors, where)
    pairs = {}
    for layer, linear, half in halves:
        other = "B" if half == "A" else "A"
        if (layer, linear, other) not in halves:
            raise AdapterError(f"lora_{other} of layers.{layer}.{linear} is missing", where=where, hint=AGAIN)
        a, b = halves[layer, linear, "A"], halves[layer, linear, "B"]
        if a.shape[0] != rank:
            raise AdapterError(
                f"lora_A of layers.{layer}.{linear} has shape {a.shape}, but the config says r = {rank}",
                where=where,
                hint=AGAIN,
            )
        pairs[layer, linear] = LoraPair(a=a, b=b, scale=scale)
    return pairs


def _sort_tensors(
    tensors: Mapping[str, NDArray[np.float32]], where: Path
) -> dict[tuple[int, str, str], NDArray[np.float32]]:
    found = {name: _LORA_KEY.match(name) for name in tensors}
    if unknown := sorted(name for name, match in found.items() if match is None):
        raise AdapterError(
            f"{len(unknown)} of {len(tensors)} tensors match nothing in the model, the first {unknown[0]}",
            where=where,
            hint="every tensor must be lora_A or lora_B of a linear of the model; none is dropped in silence",
        )
    tensor_of: dict[tuple[int, str, str], NDArray[np.float32]] = {}
    for name, match in sorted(found.items()):
        assert match is not None
        place = int(match[1]), match[2], match[3]
        if place in tensor_of:
            raise AdapterError(f"tensor {name} is there twice", where=where, hint=AGAIN)
        tensor_of[place] = tensors[name]
    return tensor_of


def _check_targets(targets: Any, linears: Collection[str], where: Path) -> None:
    # A string is a pattern or `all-linear`, a list is of names or suffixes; the tensors decide what is adapted,
    # and a listed name that they do not have was meant to do something.
    if not isinstance(targets, list):
        return
    names = [target.removeprefix("model.") for target in targets if isinstance(target, str)]
    for name in names:
        if not any(_is_suffix(linear, name) for linear in linears):
            raise AdapterError(
                f"target_modules names {name}, but the weights hold nothing for it",
                where=where,
                hint="config and weights are not of the same adapter, or the module is not of this model",
            )


def _is_suffix(linear: str, name: str) -> bool:
    return linear == name or linear.endswith("." + name) or name.endswith("." + linear)
