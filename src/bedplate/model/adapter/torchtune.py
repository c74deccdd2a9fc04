"""A folder of torchtune's own form: its names and its order of rows in a `.pt`, and PEFT's config beside it."""

from __future__ import annotations

import re
from pathlib import Path

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.peft import read_tensors
from bedplate.model.adapter.peft_config import CONFIG
from bedplate.model.adapter.peft_keys import Half, Key, Rows, Value, meaning_of, parse_key
from bedplate.model.adapter.rows import halves_apart
from bedplate.model.adapter.tensors import read_file
from bedplate.model.adapter.torch_file import parse_torch
from bedplate.model.adapter.types import RawAdapter
from bedplate.model.families import family_of
from bedplate.spec import ModelSpec

WEIGHTS = "adapter_model.pt"
# Its names of modules in PEFT's words.
_MODULES = {
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "output": "lm_head",
}
_PARTS = {
    **_MODULES,
    "attn": "self_attn",
    "tok_embeddings": "embed_tokens",
    "lora_a": "lora_A",
    "lora_b": "lora_B",
    "magnitude": "lora_magnitude_vector",
}


def find_checkpoints(path: Path) -> list[Path]:
    """The adapter checkpoints in a folder: the last one of a training run, or those of its epochs."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    return sorted(file for file in path.glob("adapter_*.pt") if re.fullmatch(r"adapter_\d+", file.stem))


def read_torchtune(path: Path, spec: ModelSpec) -> RawAdapter:
    """Read a folder with one checkpoint. Raises AdapterError or UnsupportedError."""
    weights, *more = find_checkpoints(path)
    if more:
        names = ", ".join(file.name for file in (weights, *more))
        hint = "put the one that is to be added into a folder of its own, with adapter_config.json"
        raise AdapterError(f"there are several adapter checkpoints: {names}", where=path, hint=hint)
    if not (path / CONFIG).is_file():
        raise AdapterError(
            f"there is no {CONFIG}, and {weights.name} does not tell the scale of the adapter",
            where=path,
            hint='write one: {"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […]}',
        )
    if not family_of(spec).meta_rows:
        raise UnsupportedError(
            f"torchtune's adapters of {spec.architecture} are not supported",
            where=path,
            hint="use the adapter_model.safetensors that torchtune writes beside it",
        )
    data = read_file(weights)
    tensors = parse_torch(data, weights)
    for name, value in tensors.items():
        found = _parse(name)
        if isinstance(found, Half) and found.half in ("B", "magnitude"):
            tensors[name] = halves_apart(value, found.linear, spec)
    return read_tensors(
        path,
        spec,
        config_data=read_file(path / CONFIG),
        weights=weights,
        data=data,
        tensors=tensors,
        format="torchtune",
        parse=_parse,
        module_names=_MODULES,
    )


def _parse(name: str) -> Key:
    theirs = ".".join(_PARTS.get(part, part) for part in name.split("."))
    found = parse_key(theirs)
    return meaning_of(theirs) if isinstance(found, Value | Rows) else found
