"""A PEFT LoRA adapter folder → its ranks and its A and B matrices. Needs no torch.

No field of `adapter_config.json` is ignored unless it cannot change what the adapter computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from bedplate.errors import AdapterError, NotFoundError, UnsupportedError
from bedplate.model.spec import ModelSpec, linear_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that say where an adapter comes from or how it was trained, but not what it computes.
_NO_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",  # the tensors themselves say what is adapted
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_USED = ("peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights", "bias")
# What each field must not say, in the words that a user knows it by.
_NAMES = {
    "use_dora": "DoRA",
    "use_rslora": "rank-stabilized LoRA (rsLoRA)",
    "use_qalora": "QALoRA",
    "modules_to_save": "modules trained in full beside the adapter",
    "rank_pattern": "ranks of their own for some modules",
    "alpha_pattern": "alphas of their own for some modules",
    "layers_to_transform": "adapting only some layers",
    "layer_replication": "layers used twice",
    "trainable_token_indices": "trained token embeddings",
    "lora_bias": "a bias beside B",
    "fan_in_fan_out": "transposed base weights",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapting bare parameters",
}
# Initializations that leave the base model's weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change
# them, and then A and B alone do not describe the fine-tune.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_PLAIN = "bedplate takes plain LoRA and ignores no field: merge it into the base, or train without it"
_AGAIN = "copy or save the adapter again"
_LORA_KEY = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight$")
_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter.

    ranks: rank of each adapted linear, by its name in a layer (`self_attn.q_proj`).
    fingerprint: SHA-256 over both files.
    """

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    n_layers: int
    fingerprint: str
    _tensors: Mapping[tuple[int, str, str], NDArray[np.float32]]

    def matrices(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """(module path, A float32 [rank, in], B float32 [out, rank] with alpha / rank folded in), by layer."""
        for layer in range(self.n_layers):
            for linear in self.ranks:
                a, b = self._tensors[layer, linear, "A"], self._tensors[layer, linear, "B"]
                yield f"layers.{layer}.{linear}", a, b


def read_adapter(path: Path, spec: ModelSpec) -> Adapter:
    """Read and check a PEFT folder against the model. Raises NotFoundError, AdapterError or UnsupportedError."""
    if not path.is_dir():
        raise NotFoundError("no such folder", where=path, hint=f"give a folder with {CONFIG} and {WEIGHTS}")
    config = _read_config(path / CONFIG)
    rank, alpha = _rank_and_alpha(config, path / CONFIG)
    data = _read_file(path / WEIGHTS)
    tensors = _sort_tensors(_parse(data, path / WEIGHTS), path / WEIGHTS)
    ranks = _check_fit(tensors, spec, rank, path)
    _check_targets(config.get("target_modules"), ranks, path / CONFIG)
    digest = hashlib.sha256(
        hashlib.sha256((path / CONFIG).read_bytes()).digest() + hashlib.sha256(data).digest()
    )
    return Adapter(
        path=path,
        rank=rank,
        alpha=alpha,
        ranks=ranks,
        n_layers=spec.n_layers,
        fingerprint=digest.hexdigest(),
        _tensors=_fold(tensors, alpha / rank, path),
    )


def _fold(
    tensors: Mapping[tuple[int, str, str], NDArray[np.float32]], scaling: float, path: Path
) -> dict[tuple[int, str, str], NDArray[np.float32]]:
    with np.errstate(over="ignore", invalid="ignore"):
        folded = {
            place: value * np.float32(scaling) if place[2] == "B" else value
            for place, value in tensors.items()
        }
    for layer, linear, half in folded:
        if not np.isfinite(folded[layer, linear, half]).all():
            raise AdapterError(
                f"lora_alpha / r = {scaling} times lora_B of layers.{layer}.{linear} is beyond float32",
                where=path / CONFIG,
                hint=_AGAIN,
            )
    return folded


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        hint = "an adapter saved as .bin can be saved again with PEFT's save_pretrained"
        raise AdapterError(f"there is no {path.name}", where=path.parent, hint=hint) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read_file(path))
    except ValueError as error:
        raise AdapterError(f"is no JSON: {error}", where=path, hint=_AGAIN) from None
    if not isinstance(config, dict):
        raise AdapterError("is not a JSON object", where=path, hint=_AGAIN)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"PEFT type {config.get('peft_type')!r} is not supported", where=path, hint="supported: LORA"
        )
    for field, value in sorted(config.items()):
        if field in _USED or field in _NO_EFFECT or value is False or value in (None, {}, [], ""):
            continue
        meaning = f" ({_NAMES[field]})" if field in _NAMES else ""
        raise UnsupportedError(
            f"{field} = {_short(value)}{meaning} is not supported",
            where=path,
            hint=_PLAIN,
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"bias = {config['bias']!r} (trained biases) is not supported", where=path, hint=_PLAIN
        )
    start = config.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        raise UnsupportedError(
            f"init_lora_weights = {start!r} is not supported: it may have changed the base model's weights",
            where=path,
            hint="convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    return config


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _rank_and_alpha(config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"r must be a positive integer, got {rank!r}", where=where, hint=_AGAIN)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha must be a number, got {alpha!r}", where=where, hint=_AGAIN)
    return rank, float(alpha)


def _parse(data: bytes, where: Path) -> dict[str, NDArray[np.float32]]:
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AdapterError(f"is not a whole safetensors file: {error}", where=where, hint=_AGAIN) from None
    tensors = {}
    for name, entry in entries:
        raw, kind, shape = entry["data"], entry["dtype"], entry["shape"]
        if kind == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            value = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in _DTYPES:
            value = np.frombuffer(raw, _DTYPES[kind]).astype(np.float32)
        else:
            raise AdapterError(f"tensor {name} has dtype {kind}", where=where, hint="save it as float32")
        if not np.isfinite(value).all():
            hint = "its training diverged, or the file is damaged"
            raise AdapterError(f"tensor {name} holds NaN or infinity", where=where, hint=hint)
        tensors[name] = value.reshape(shape)
    return tensors


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
            raise AdapterError(f"tensor {name} is there twice", where=where, hint=_AGAIN)
        tensor_of[place] = tensors[name]
    return tensor_of


def _check_fit(
    tensors: Mapping[tuple[int, str, str], NDArray[np.float32]], spec: ModelSpec, rank: int, path: Path
) -> dict[str, int]:
    """Ranks by linear, in the order of the model. Every layer must have A and B of every adapted linear."""
    shapes = linear_shapes(spec)
    where = path / WEIGHTS
    for layer, linear, half in tensors:
        if linear not in shapes or layer >= spec.n_layers:
            raise AdapterError(
                f"it adapts layers.{layer}.{linear}, which the model does not have",
                where=where,
                hint=f"the model has {spec.n_layers} layers with {', '.join(shapes)}",
            )
        rows, columns = shapes[linear]
        wanted = (rank, columns) if half == "A" else (rows, rank)
        if tensors[layer, linear, half].shape != wanted:
            raise AdapterError(
                f"lora_{half} of layers.{layer}.{linear} has shape {tensors[layer, linear, half].shape}, "
                f"the model and r = {rank} want {wanted}",
                where=where,
                hint="the adapter was trained on another model",
            )
    adapted = [linear for linear in shapes if any(linear == name for _, name, _ in tensors)]
    if not adapted:
        raise AdapterError("it adapts nothing: there are no tensors in it", where=where, hint=_AGAIN)
    for layer in range(spec.n_layers):
        for linear in adapted:
            for half in "AB":
                if (layer, linear, half) not in tensors:
                    raise AdapterError(
                        f"lora_{half} of layers.{layer}.{linear} is missing",
                        where=where,
                        hint="an adapter must adapt a linear in every layer or in none",
                    )
    return dict.fromkeys(adapted, rank)


def _check_targets(targets: Any, ranks: Mapping[str, int], where: Path) -> None:
    # A string is a pattern or `all-linear`, a list is of names or suffixes; the tensors decide what is adapted,
    # and a listed name that they do not have was meant to do something.
    if not isinstance(targets, list):
        return
    names = [target.removeprefix("model.") for target in targets if isinstance(target, str)]
    for name in names:
        if not any(_is_suffix(linear, name) for linear in ranks):
            raise AdapterError(
                f"target_modules names {name}, but the weights hold nothing for it",
                where=where,
                hint="config and weights are not of the same adapter, or the module is not of this model",
            )


def _is_suffix(linear: str, name: str) -> bool:
    return linear == name or linear.endswith("." + name) or name.endswith("." + linear)
