"""Hugging Face `config.json` → the dimensions of a decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bedplate.errors import CheckpointError, NotFoundError, UnsupportedError

ARCHITECTURES = ("LlamaForCausalLM",)
_DAMAGED = "the file is damaged: download it again"
_NEVER = "bedplate never ignores a field that changes what the model computes"

# Fields that change what the model computes, with the only values that the decoder implements. A config that says
# otherwise is refused: ignoring one would give wrong logits without a word.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1.0, 1),
    "rope_interleaved": (None, False),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
_ROPE_FIELDS = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. `scaling` is None for type `default`, or the `llama3` parameters."""

    theta: float
    scaling: Llama3Scaling | None


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """`rope_type: llama3` (as in Llama 3.1): frequencies are stretched by `factor`, the high ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions of a decoder of the Llama family. Sizes count elements."""

    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_exists(model: Path) -> None:
    """NotFoundError: there is nothing at this path."""
    if not model.exists():
        raise NotFoundError("no such file or folder", where=model, hint="give a model folder or a .gguf file")


def spec_from_dict(data: Mapping[str, Any]) -> ModelSpec:
    """The inverse of `ModelSpec.to_dict`; more keys do no harm."""
    fields = {name: data[name] for name in ModelSpec.__dataclass_fields__}
    scaling = fields["rope"]["scaling"]
    fields["rope"] = RopeSpec(
        theta=fields["rope"]["theta"], scaling=None if scaling is None else Llama3Scaling(**scaling)
    )
    return ModelSpec(**fields)


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each linear of a layer, by its name in the layer, in the order of the model."""
    q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    return {
        "self_attn.q_proj": (q_width, spec.dim),
        "self_attn.k_proj": (kv_width, spec.dim),
        "self_attn.v_proj": (kv_width, spec.dim),
        "self_attn.o_proj": (spec.dim, q_width),
        "mlp.gate_proj": (spec.hidden_dim, spec.dim),
        "mlp.up_proj": (spec.hidden_dim, spec.dim),
        "mlp.down_proj": (spec.dim, spec.hidden_dim),
    }


# The linears of a layer that have one input, by the place of the correction that they share (see Correction).
CORRECTED_TOGETHER = {
    "self_attn.input_correction": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.output_correction": ("self_attn.o_proj",),
    "mlp.input_correction": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.output_correction": ("mlp.down_proj",),
}


def corrected_together(n_layers: int, corrections: Collection[str]) -> dict[str, list[str]]:
    """Module path of each correction of a model → those of the linears that it corrects, which have one input.

    corrections: the linears that have one, by their names in a layer.
    """
    together = {}
    for layer in range(n_layers):
        for place, names in CORRECTED_TOGETHER.items():
            if paths := [f"layers.{layer}.{name}" for name in names if name in corrections]:
                together[f"layers.{layer}.{place}"] = paths
    return together


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`. Raises CheckpointError if it is missing or is no JSON object."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "there is no config.json",
            where=path.parent,
            hint="give the folder of a Hugging Face model (config.json, *.safetensors, tokenizer.json), "
            "or a .gguf file",
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=path, hint=_DAMAGED) from None
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=path, hint=_DAMAGED)
    return config


def spec_from_config(config: Mapping[str, Any], *, where: str | Path) -> ModelSpec:
    """Translate a Hugging Face config. Raises UnsupportedError or CheckpointError, naming the field."""
    architecture = _architecture(config, where)
    for field, allowed in _ONLY_VALUES.items():
        value = config.get(field, allowed[0])
        if value not in allowed:
            raise UnsupportedError(
                f"{field} = {value!r} is not supported (only {allowed[0]!r})",
                where=where,
                hint=_NEVER,
            )
    n_heads = _positive(config, "num_attention_heads", where)
    n_kv_heads = _positive(config, "num_key_value_heads", where, default=n_heads)
    dim = _positive(config, "hidden_size", where)
    head_dim = _positive(config, "head_dim", where, default=dim // n_heads)
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}",
            where=where,
            hint=_DAMAGED,
        )
    if head_dim % 2:
        raise UnsupportedError(
            f"head_dim {head_dim} is odd, and RoPE rotates halves", where=where, hint="use another model"
        )
    return ModelSpec(
        architecture=architecture,
        dim=dim,
        n_layers=_positive(config, "num_hidden_layers", where),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=_positive(config, "intermediate_size", where),
        vocab_size=_positive(config, "vocab_size", where),
        max_positions=_positive(config, "max_position_embeddings", where, default=2048),
        norm_eps=_number(config, "rms_norm_eps", where, default=1e-6),
        rope=_rope(config, where),
        tied_head=_flag(config, "tie_word_embeddings", where),
        attention_bias=_flag(config, "attention_bias", where),
        mlp_bias=_flag(config, "mlp_bias", where),
    )


def _architecture(config: Mapping[str, Any], where: str | Path) -> str:
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {name!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return str(name)


def _positive(config: Mapping[str, Any], field: str, where: str | Path, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{field} must be a positive integer, got {value!r}", where=where, hint=_DAMAGED
        )
    return value


def _number(config: Mapping[str, Any], field: str, where: str | Path, default: float | None = None) -> float:
    value: Any = config.get(field)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value <= 0:
        raise CheckpointError(f"{field} must be a positive number, got {value!r}", where=where, hint=_DAMAGED)
    return float(value)


def _flag(config: Mapping[str, Any], field: str, where: str | Path) -> bool:
    value = config.get(field)
    if value is not None and type(value) is not bool:
        raise CheckpointError(f"{field} must be true or false, got {value!r}", where=where, hint=_DAMAGED)
    return bool(value)


def _rope(config: Mapping[str, Any], where: str | Path) -> RopeSpec:
    # transformers 5 writes rope_parameters; earlier versions write rope_theta and rope_scaling.
    parameters: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{name} must be an object, got {value!r}", where=where, hint=_DAMAGED)
        parameters |= value
    theta = _number(parameters, "rope_theta", where, default=10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UnsupportedError(
            f"RoPE scaling {kind!r} is not supported", where=where, hint="supported: default, llama3"
        )
    # Type `default` has no parameters but these: what else stands beside it is read by nobody.
    refused = set(parameters) - _ROPE_FIELDS if kind == "llama3" else set()
    if parameters.get("partial_rotary_factor") not in (None, 1):
        refused.add("partial_rotary_factor")
    if refused:
        field = min(refused)
        raise UnsupportedError(
            f"{field} = {parameters[field]!r} of RoPE {kind!r} is not supported", where=where, hint=_NEVER
        )
    return RopeSpec(theta=theta, scaling=None if kind == "default" else _llama3(parameters, where))


def _llama3(parameters: Mapping[str, Any], where: str | Path) -> Llama3Scaling:
    low, high = (_number(parameters, f"{end}_freq_factor", where) for end in ("low", "high"))
    if low >= high:
        raise CheckpointError(
            f"low_freq_factor {low} is not below high_freq_factor {high}", where=where, hint=_DAMAGED
        )
    return Llama3Scaling(
        factor=_number(parameters, "factor", where),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_positive(parameters, "original_max_position_embeddings", where),
    )
