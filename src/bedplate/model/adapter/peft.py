"""A folder as PEFT saves it → RawAdapter. What is adapted must agree with the config, as in PEFT."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.fit import check_places
from bedplate.model.adapter.peft_changed import Changed, replicated
from bedplate.model.adapter.peft_config import CONFIG, INVOCATION, MERGE, PeftConfig, read_config
from bedplate.model.adapter.peft_keys import Key, parse_key
from bedplate.model.adapter.peft_targets import Targets
from bedplate.model.adapter.peft_weights import Halves, Tensors, make_pair, sort_tensors
from bedplate.model.adapter.tensors import parse_safetensors, read_file
from bedplate.model.adapter.torch_file import parse_torch
from bedplate.model.adapter.types import EMBEDDING, HEAD, LoraPair, Place, RawAdapter, module_of
from bedplate.model.stored import stored_linears
from bedplate.spec import ModelSpec

WEIGHTS, OLDER = "adapter_model.safetensors", "adapter_model.bin"
# Names that LLaMA-Factory gives to adapters whose training began with PiSSA.
_PISSA_FOLDERS = frozenset({"pissa_init", "pissa_backup"})


def read_peft(path: Path, spec: ModelSpec) -> RawAdapter:
    """Read a folder of PEFT's own form. Raises AdapterError or UnsupportedError."""
    config_data = read_file(path / CONFIG)
    # As PEFT: the older form only where there is no other.
    weights = path / (WEIGHTS if (path / WEIGHTS).is_file() or not (path / OLDER).is_file() else OLDER)
    data = read_file(weights)
    parse_file = parse_safetensors if weights.name == WEIGHTS else parse_torch
    tensors = parse_file(data, weights)
    return read_tensors(path, spec, config_data=config_data, weights=weights, data=data, tensors=tensors)


def read_tensors(
    path: Path,
    spec: ModelSpec,
    *,
    config_data: bytes,
    weights: Path,
    data: bytes,
    tensors: Tensors,
    format: str = "peft",
    parse: Callable[[str], Key] = parse_key,
    module_names: Mapping[str, str] = MappingProxyType({}),
) -> RawAdapter:
    """Tensors of a file `weights` with the content `data`, and PEFT's config with the content `config_data`.

    parse: what a tensor is, by its name. module_names: what modules are called that the config calls otherwise.
    Raises AdapterError or UnsupportedError.
    """
    config = read_config(config_data, path / CONFIG)
    if not isinstance(config.targets, str):
        targets_named = tuple(module_names.get(name, name) for name in config.targets)
        config = replace(config, targets=targets_named)
    layers = replicated(config, spec, path / CONFIG)
    own = spec if layers is None else replace(spec, layers=tuple(spec.layers[layer] for layer in layers))
    found = sort_tensors(tensors, weights, parse)
    check_places(found.halves, own, weights)
    targets = Targets(config, path, tied_head=spec.tied_head)
    changed = Changed(config, own, found, config_file=path / CONFIG, weights=weights)
    digest = hashlib.sha256(hashlib.sha256(config_data).digest() + hashlib.sha256(data).digest())
    return RawAdapter(
        path=path,
        format=format,
        weights=weights,
        pairs=_pairs(found.halves, targets, config, path, weights, magnitudes=format != "peft"),
        parameters=changed.parameters(),
        rows=changed.rows(),
        layers=layers,
        invocation=config.invocation,
        alpha=config.alpha,
        fingerprint=digest.hexdigest(),
        warnings=(*_missing(found.halves, targets, config, own, path), *_pissa(path)),
    )


def _pairs(
    halves: dict[Place, Halves],
    targets: Targets,
    config: PeftConfig,
    path: Path,
    weights: Path,
    *,
    magnitudes: bool,
) -> dict[Place, LoraPair]:
    """magnitudes: they count though the config does not speak of DoRA."""
    blocks = config.block_diagonal.blocks if config.block_diagonal else 1
    pairs = {}
    for place, of_linear in halves.items():
        module = module_of(place)
        target = targets.find(_module_path(place))
        if target is None:
            raise AdapterError(
                f"the weights hold lora_A and lora_B of {module}, which the config does not adapt: "
                "PEFT would drop them",
                where=path / CONFIG,
                hint="use the config and the weights of one adapter, or add the missing name to target_modules",
            )
        for half, field, wanted in (
            ("magnitude", "use_dora", config.dora),
            ("bias", "lora_bias", config.lora_bias),
        ):
            if half in of_linear and not wanted and not (half == "magnitude" and magnitudes):
                raise AdapterError(
                    f"the weights hold a {half} of {module}, but {field} is false: PEFT would drop it",
                    where=path / CONFIG,
                    hint=f"use the config and the weights of one adapter, or set {field}",
                )
            if wanted and half not in of_linear:
                raise AdapterError(
                    f"{field} is true, but the weights hold no {half} of {module}",
                    where=path / CONFIG,
                    hint="use the config and the weights of one adapter",
                )
        _check_embedding(place, of_linear, config, path)
        pairs[place] = make_pair(place, of_linear, target, blocks, weights)
    return pairs


def _check_embedding(place: Place, halves: Halves, config: PeftConfig, path: Path) -> None:
    if place != (None, EMBEDDING):
        return
    if "magnitude" in halves:
        raise UnsupportedError(
            "use_dora = true on the embedding (DoRA) is not supported", where=path / CONFIG, hint=MERGE
        )
    # PEFT refuses these for an embedding, but for the last two, which it trains in another way only.
    for field, is_set in (
        ("use_bdlora", config.block_diagonal is not None),
        ("lora_bias", config.lora_bias),
        (INVOCATION, config.invocation is not None),
    ):
        if is_set:
            raise AdapterError(
                f"{field} is set and the embedding is adapted, which PEFT refuses",
                where=path / CONFIG,
                hint="use the config and the weights of one adapter",
            )


def _missing(
    present: Collection[Place], targets: Targets, config: PeftConfig, spec: ModelSpec, path: Path
) -> Iterator[str]:
    """A warning about what the config adapts and the weights lack.

    Raises AdapterError where PEFT would take random numbers.
    """
    places: list[Place] = [
        (layer, linear) for layer in range(spec.n_layers) for linear in stored_linears(spec)
    ]
    absent = [place for place in (*places, (None, HEAD), (None, EMBEDDING)) if place not in present]
    missing = [name for name in map(_module_path, absent) if targets.find(name)]
    if not missing:
        return
    what = f"the config adapts {missing[0]}, but the weights hold nothing for it"
    if len(missing) > 1:
        what += f" (nor for {len(missing) - 1} more)"
    if not config.starts_at_zero:
        raise AdapterError(
            f"{what}, and PEFT would take random numbers (init_lora_weights is false)",
            where=path / CONFIG,
            hint="use the config and the weights of one adapter",
        )
    yield f"{path}: {what}: it stays as in the base model"


def _pissa(path: Path) -> Iterator[str]:
    if path.resolve().name in _PISSA_FOLDERS:
        yield (
            f"{path}: by its name, training began with PiSSA, which changes the base model's weights. "
            "Nothing in the files tells. If so, this adapter is wrong on the plain base: add pissa_converted instead"
        )


def _module_path(place: Place) -> str:
    """As transformers names it, and PEFT matches it."""
    module = module_of(place)
    return module if module == HEAD else f"model.{module}"
