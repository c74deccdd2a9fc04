"""A Hugging Face `config.json` → the description of a decoder, for the families that bedplate knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bedplate.errors import CheckpointError, NotFoundError, UnsupportedError
from bedplate.model.families import FAMILIES, Family, read_family
from bedplate.model.fields import Fields, shown
from bedplate.model.json_file import read_object
from bedplate.spec import ModelSpec
from bedplate.spec_check import flaw

# With these, transformers reads other files than config.json and model.safetensors, or another part of config.json.
_ELSEWHERE = (
    "configuration_files",
    "transformers_weights",
    "text_config",
    "text_encoder",
    "decoder",
    "generator",
)


def check_exists(model: Path) -> None:
    """NotFoundError: there is nothing at this path."""
    if not model.exists():
        raise NotFoundError("no such file or folder", where=model, hint="give a model folder or a .gguf file")


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`. Raises CheckpointError if it is missing or is no JSON object."""
    try:
        return read_object(path)
    except FileNotFoundError:
        hint = "give the folder of a Hugging Face model (config.json, *.safetensors, tokenizer.json), or a .gguf file"
        if snapshots := sorted(path.parent.glob("snapshots/*/config.json")):
            hint = f"this is a folder of the Hub's cache: give {snapshots[-1].parent}"
        raise CheckpointError("there is no config.json", where=path.parent, hint=hint) from None


def spec_from_config(config: Mapping[str, Any], *, where: str | Path) -> ModelSpec:
    """Translate a Hugging Face config. Raises UnsupportedError or CheckpointError, naming the field."""
    fields = Fields(config, where)
    family = _family(fields)
    for name in _ELSEWHERE:
        fields.only(name, None, hint="save the model again with save_pretrained, which leaves this field out")
    spec = read_family(fields, family)
    if wrong := flaw(spec):
        raise CheckpointError(
            f"no model can be as the fields say: {wrong}", where=where, hint="use another model"
        )
    return spec


def _family(config: Fields) -> Family:
    """As transformers' AutoModelForCausalLM: by model_type. What `architectures` says has to agree with it."""
    model_type, names = config.get("model_type"), config.get("architectures")
    supported = ", ".join(FAMILIES)
    if model_type is None:
        raise CheckpointError(
            "model_type is missing, and transformers needs it to know which model this is",
            where=config.where,
            hint=f"add the model's model_type; supported: {supported}",
        )
    if type(model_type) is not str or model_type not in FAMILIES:
        raise UnsupportedError(
            f"model_type {shown(model_type)} (architectures {shown(names)}) is not supported",
            where=config.where,
            hint=f"supported: {supported}",
        )
    family = FAMILIES[model_type]
    # Without `architectures` transformers builds the causal language model of the model_type, too.
    if names not in (None, [], [family.architecture]):
        raise UnsupportedError(
            f"architectures {shown(names)} does not agree with model_type {model_type!r}, "
            f"which means {family.architecture}",
            where=config.where,
            hint="if this is a causal language model, correct the wrong field; otherwise use another model",
        )
    return family
