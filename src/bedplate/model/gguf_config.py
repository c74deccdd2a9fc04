"""The fields of a GGUF → what the config.json of the same model would say.

Every field of the architecture has to be asked for, or to say what is the case anyway. Others are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bedplate.errors import UnsupportedError
from bedplate.model.fields import Fields
from bedplate.model.gguf_architectures import Architecture, architecture_of
from bedplate.model.gguf_fields import USE_FOLDER, Asked, Config, GgufFields, read_rope
from bedplate.model.rope_config import MOST_POSITIONS

# Values with which a field that is not asked for says what is the case anyway.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "use_parallel_residual": (False,),
}


def read_config(
    values: Mapping[str, Any],
    tensors: Collection[str],
    factors: Mapping[str, Sequence[float]],
    path: Path,
) -> Config:
    """What the config.json of a file with these fields and tensors would say. Raises UnsupportedError or
    CheckpointError, naming the field.
    """
    architecture, name = architecture_of(values, path), values["general.architecture"]
    asked = Asked(values)
    fields = GgufFields(Fields(asked, path), name, tensors, factors)
    config = {**_common(fields, architecture, values), **architecture.config(fields)}
    for full in sorted(values):
        if not full.startswith(f"{name}.") or full in asked.names:
            continue
        value, short = values[full], full.removeprefix(f"{name}.")
        allowed = _NO_EFFECT.get(short, ())
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise fields.refused(short, value)
    return config


def _common(fields: GgufFields, architecture: Architecture, values: Mapping[str, Any]) -> Config:
    tokens, heads = values.get("tokenizer.ggml.tokens"), fields.count("attention.head_count")
    rows = {"default": len(tokens)} if isinstance(tokens, list) and tokens else {}
    # Where a config has a number for the other kind of norm, too, the converter writes both.
    eps, other = (f"attention.layer_norm{kind}_epsilon" for kind in ("_rms", ""))
    if architecture.layer_norm:
        eps, other = other, eps
    fields.get(other)
    return {
        "hidden_size": fields.count("embedding_length"),
        "num_hidden_layers": fields.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count_of_all_layers("attention.head_count_kv", default=heads),
        "intermediate_size": fields.count_of_all_layers("feed_forward_length"),
        "max_position_embeddings": fields.count("context_length", most=MOST_POSITIONS),
        "vocab_size": fields.count("vocab_size", **rows),
        "tie_word_embeddings": "output.weight" not in fields.tensors,
        architecture.layer_norm or "rms_norm_eps": fields.number(eps),
        "head_dim": fields.head_dim,
        **_turning(fields, architecture),
    }


def _turning(fields: GgufFields, architecture: Architecture) -> Config:
    head_dim, name = fields.head_dim, "rope.dimension_count"
    rope = read_rope(fields, yarn=architecture.yarn)
    turning = fields.count(name, default=head_dim)
    if architecture.partial and turning <= head_dim:
        rope["partial_rotary_factor"] = turning / head_dim
    elif turning != head_dim:
        raise UnsupportedError(
            f"{fields.at(name)} = {turning} is not supported with heads of {head_dim}",
            where=fields.fields.where,
            hint=USE_FOLDER,
        )
    return {"rope_parameters": rope}
