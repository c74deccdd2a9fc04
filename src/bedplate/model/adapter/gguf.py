"""An adapter of llama.cpp: one `.gguf`, with its names and its order of the rows of q and k. Needs no torch."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.config_fields import short
from bedplate.model.adapter.peft_config import MERGE
from bedplate.model.adapter.peft_keys import Half, Key, NotTaken
from bedplate.model.adapter.peft_targets import Target
from bedplate.model.adapter.peft_weights import make_pair, pair_up
from bedplate.model.adapter.rows import halves_apart
from bedplate.model.adapter.tensors import check_finite, read_file
from bedplate.model.adapter.types import HEAD, RawAdapter
from bedplate.model.families import family_of
from bedplate.model.gguf_names import LAYER_LINEARS
from bedplate.spec import ModelSpec

MAGIC = b"GGUF"
_AGAIN = "convert the adapter again with llama.cpp's convert_lora_to_gguf.py"
_HALF = re.compile(r"^blk\.([0-9]{1,6})\.([a-z0-9_]+)\.weight\.lora_([ab])$")
_OF_HEAD = re.compile(r"^output\.weight\.lora_([ab])$")
_PREFIX = "adapter.lora.prompt_prefix"
_INVOCATION = "adapter.alora.invocation_tokens"  # of an activated LoRA, with PEFT's meaning
# Of `adapter.…`: the type, the factor, the invocation, and what only describes the adapter.
_KNOWN = {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", _PREFIX, _INVOCATION}
_MEANINGS = (
    (re.compile(r"^token_embd\."), "a LoRA on the embedding table"),
    (re.compile(r"^output\."), "a LoRA on the head"),
    (re.compile(r"norm\.(?:weight|bias)$"), "trained norms"),
    (re.compile(r"_exps?\.|_shexp\."), "a LoRA on experts"),
    (re.compile(r"\.lora_magnitude$|\.lora_m$"), "DoRA"),
    (re.compile(r"\.bias"), "trained biases"),
)


def read_gguf(path: Path, spec: ModelSpec) -> RawAdapter:
    """Read a `.gguf` file. Raises AdapterError or UnsupportedError; the latter too if `gguf` is not installed."""
    gguf = _package(path)
    digest = hashlib.sha256(read_file(path)).hexdigest()
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises what its reading runs into
        raise AdapterError(f"is not a whole GGUF file: {error}", where=path, hint=_AGAIN) from None
    alpha, warnings = _check_fields(fields, spec, path)
    tensors = {tensor.name: _values(gguf, tensor, path) for tensor in reader.tensors}
    pairs = {}
    for (layer, linear), halves in pair_up(tensors, path, partial(_parse, tied_head=spec.tied_head)).items():
        rank = halves["B"].shape[-1] if halves["B"].ndim else 0
        target = Target(
            rank=rank, rank_from="lora_b", scale=alpha / rank if alpha and rank else 1.0, blocks_of=None
        )
        halves["B"] = halves_apart(halves["B"], linear, spec)
        pairs[layer, linear] = make_pair((layer, linear), halves, target, 1, path)
    return RawAdapter(
        path=path,
        format="gguf",
        weights=path,
        pairs=pairs,
        invocation=_invocation(fields, path),
        alpha=alpha or float(max((len(pair.a) for pair in pairs.values()), default=0)),
        fingerprint=digest,
        warnings=warnings,
    )


def _package(where: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this file can only be read with the Python package {error.name}",
            where=where,
            hint="pip install gguf",
        ) from None
    return gguf


def _check_fields(fields: Mapping[str, Any], spec: ModelSpec, where: Path) -> tuple[float, tuple[str, ...]]:
    """alpha (0 stands for a factor of 1) and warnings."""
    kind = fields.get("general.type")
    if kind != "adapter":
        what = "is a model, not an adapter" if kind in (None, "model") else f"is a GGUF of type {short(kind)}"
        raise AdapterError(what, where=where, hint="give a file of convert_lora_to_gguf.py")
    if fields.get("adapter.type") != "lora":
        what = f"adapter.type = {short(fields.get('adapter.type'))} is not supported"
        raise UnsupportedError(what, where=where, hint="supported: lora")
    wanted = family_of(spec).gguf
    if fields.get("general.architecture") != wanted:
        raise AdapterError(
            f"it adapts models of the architecture {short(fields.get('general.architecture'))}, "
            f"but the bundle's model is {short(wanted or spec.architecture)}",
            where=where,
            hint="add the adapter to the model that it was trained on",
        )
    for name, value in fields.items():
        if name.startswith("adapter.") and name not in _KNOWN and value != []:
            raise UnsupportedError(f"{name} = {short(value)} is not supported", where=where, hint=MERGE)
    alpha = fields.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"adapter.lora.alpha must be a number, got {short(alpha)}", where=where, hint=_AGAIN
        )
    prefix = fields.get(_PREFIX)
    if not prefix:
        return float(alpha), ()
    text = f"{where}: it was trained on prompts that begin with {short(prefix)}; bedplate does not add this"
    return float(alpha), (text,)


def _invocation(fields: Mapping[str, Any], where: Path) -> tuple[int, ...] | None:
    tokens = fields.get(_INVOCATION, [])
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        what = f"{_INVOCATION} must be a list of token ids, got {short(tokens)}"
        raise AdapterError(what, where=where, hint=_AGAIN)
    return tuple(tokens) or None


def _values(gguf: Any, tensor: Any, where: Path) -> NDArray[np.float32]:
    try:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except Exception as error:
        what = f"tensor {tensor.name} of type {tensor.tensor_type.name} cannot be read: {error}"
        raise AdapterError(what, where=where, hint=_AGAIN) from None
    check_finite(tensor.name, values, where)
    return values


def _parse(name: str, *, tied_head: bool) -> Key:
    """tied_head: the model has no `output`, and llama.cpp takes no LoRA on it."""
    if (found := _OF_HEAD.match(name)) and not tied_head:
        return Half(layer=None, linear=HEAD, half=found[1].upper())
    found = _HALF.match(name)
    if found and found[2] in LAYER_LINEARS:
        return Half(layer=int(found[1]), linear=LAYER_LINEARS[found[2]], half=found[3].upper())
    for weight, (pattern, meaning) in enumerate(_MEANINGS):
        if pattern.search(name):
            return NotTaken(meaning=meaning, weight=weight)
    return NotTaken(meaning="of a linear that this model does not have", weight=len(_MEANINGS))
