"""How llama.cpp keeps the models of each architecture that bedplate knows.

It keeps some of what a model computes in its own source: where windows are, which layers turn q and k. The functions
here give what the config.json of the same model would say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bedplate.errors import UnsupportedError
from bedplate.model.families.common import FULL, SLIDING
from bedplate.model.gguf_fields import (
    Config,
    GgufFields,
    check_one_base,
    read_rope,
    read_windows,
)
from bedplate.model.rope_config import MOST_POSITIONS


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp keeps the models of an architecture.

    config: what is not in `_common`.
    interleaved: rows of q and k that turn together stand side by side, from the first row of a head on.
    layer_norm: the name of its epsilon in a config; None: the norm is an RMS norm.
    partial: only the first rows of a head turn, as many as a field says.
    yarn, factors: it has YaRN; it has a factor for each frequency, as Llama 3.
    fused: gate and up may be one tensor, with the rows of the gate first.
    names: tensors of a layer that are called otherwise than in other architectures.
    """

    config: Callable[[GgufFields], Config]
    interleaved: bool = False
    layer_norm: str | None = None
    partial: bool = False
    yarn: bool = True
    factors: bool = False
    fused: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


def architecture_of(fields: Mapping[str, Any], path: Path) -> Architecture:
    name = fields.get("general.architecture")
    if type(name) is not str or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"GGUF architecture {name!r} is not supported",
            where=path,
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[name]


def _only(model_type: str) -> Callable[[GgufFields], Config]:
    return lambda fields: {"model_type": model_type}


def _query_scalar(fields: GgufFields, largest: int) -> int:
    """Of the largest model of a family, llama.cpp takes the width that heads would have without head_dim."""
    if fields.layers == largest:
        return fields.count("embedding_length") // fields.count("attention.head_count")
    return fields.head_dim


def _gemma2(fields: GgufFields) -> Config:
    check_one_base(fields)
    return {
        "model_type": "gemma2",
        "layer_types": read_windows(fields, 2),
        "sliding_window": fields.count("attention.sliding_window", default=4096, most=MOST_POSITIONS),
        "query_pre_attn_scalar": _query_scalar(fields, 46),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", default=30.0),
    }


def _gemma3(fields: GgufFields) -> Config:
    rope = read_rope(fields, yarn=False)
    window = fields.count("attention.sliding_window", default=0, least=0, most=MOST_POSITIONS)
    kinds = read_windows(fields, 6) if window else [FULL] * fields.layers
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", default=10000.0)}
    return {
        "model_type": "gemma3_text",
        "layer_types": kinds,
        "sliding_window": window or None,
        "query_pre_attn_scalar": _query_scalar(fields, 62),
        "final_logit_softcapping": fields.get("final_logit_softcapping") or None,
        "rope_parameters": {FULL: rope, SLIDING: local},
    }


def _phi3(fields: GgufFields) -> Config:
    """llama.cpp reads the window, and computes without it; transformers computes with it, and so does bedplate."""
    window = fields.count("attention.sliding_window", default=0, least=0, most=MOST_POSITIONS)
    config: Config = {"model_type": "phi3", "sliding_window": window or None}
    short, long = (fields.factors.get(f"rope_factors_{length}.weight") for length in ("short", "long"))
    if short is None or long is None:
        return config
    rope, name = read_rope(fields, yarn=False), "rope.scaling.original_context_length"
    width = fields.count("rope.dimension_count", default=fields.head_dim)
    return config | {
        # Outside, where it counts, or the family's own would.
        "original_max_position_embeddings": fields.count(name, most=MOST_POSITIONS),
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": width / fields.head_dim,
            "short_factor": short,
            "long_factor": long,
            "attention_factor": fields.number("rope.scaling.attn_factor"),
        },
    }


def _granite(fields: GgufFields) -> Config:
    # Models of Granite 4 without state layers say how these would be.
    for name in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank"):
        fields.get(f"ssm.{name}")
    shared = fields.get("expert_shared_feed_forward_length")
    if shared is not None and shared != fields.count_of_all_layers("feed_forward_length"):
        raise fields.refused("expert_shared_feed_forward_length", shared)
    # With `finetuned` false, no layer turns q and k, which a config of Granite 3 cannot say.
    still = fields.get("rope.scaling.finetuned") is False
    hybrid = {
        "model_type": "granitemoehybrid",
        "num_local_experts": 0,
        "shared_intermediate_size": fields.count_of_all_layers("feed_forward_length"),
        "layer_types": [FULL] * fields.layers,
    }
    return {
        **(hybrid if still else {"model_type": "granite"}),
        "embedding_multiplier": fields.number("embedding_scale", default=1.0),
        "residual_multiplier": fields.number("residual_scale", default=1.0),
        "attention_multiplier": fields.number("attention.scale", default=fields.head_dim**-0.5),
        "logits_scaling": fields.number("logit_scale"),
    }


def _olmo2(fields: GgufFields) -> Config:
    rope = read_rope(fields, yarn=True)
    window = fields.count("attention.sliding_window", default=0, least=0, most=MOST_POSITIONS)
    if not window:
        return {"model_type": "olmo2"}
    base = fields.number("rope.freq_base_swa", default=rope["rope_theta"])
    return {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": read_windows(fields, 4),
        "rope_parameters": {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": base}},
    }


def _stablelm(fields: GgufFields) -> Config:
    parallel = "blk.0.ffn_norm.weight" not in fields.tensors
    name = "use_parallel_residual"
    if fields.fields.flag(fields.at(name), default=parallel) != parallel:
        raise fields.refused(name, fields.get(name))
    return {"model_type": "stablelm", "use_parallel_residual": parallel}


def _smollm3(fields: GgufFields) -> Config:
    return {"model_type": "smollm3", "no_rope_layer_interval": 4, "use_sliding_window": False}


def _mistral3(fields: GgufFields) -> Config:
    scale = fields.get("attention.temperature_scale")
    if not scale:
        return {"model_type": "mistral", "sliding_window": None}
    rope = read_rope(fields, yarn=True)
    if rope["rope_type"] != "yarn":
        raise fields.refused("rope.scaling.type", fields.get("rope.scaling.type"))
    mscale = fields.get("rope.scaling.yarn_log_multiplier")
    scales = {"mscale": 1.0, "mscale_all_dim": mscale} if mscale else {}
    return {
        "model_type": "ministral3",
        "sliding_window": None,
        "rope_parameters": {**rope, **scales, "llama_4_scaling_beta": scale},
    }


def _cohere2(fields: GgufFields) -> Config:
    check_one_base(fields)
    return {
        "model_type": "cohere2",
        "layer_types": read_windows(fields, 4),
        "sliding_window": fields.count("attention.sliding_window", most=MOST_POSITIONS),
        "logit_scale": fields.number("logit_scale"),
    }


def _exaone4(fields: GgufFields) -> Config:
    """llama.cpp computes windows in models of 64 layers only; transformers, wherever there is one."""
    check_one_base(fields)
    usual = 4096 if fields.layers == 64 else 0
    window = fields.count("attention.sliding_window", default=usual, least=0, most=MOST_POSITIONS)
    kinds = read_windows(fields, 4) if window else [FULL] * fields.layers
    return {"model_type": "exaone4", "sliding_window": window or None, "layer_types": kinds}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(config=_only("llama"), interleaved=True, factors=True),
    "qwen2": Architecture(config=_only("qwen2")),
    "qwen3": Architecture(config=_only("qwen3")),
    "gemma": Architecture(config=_only("gemma"), yarn=False),
    "gemma2": Architecture(config=_gemma2, yarn=False),
    "gemma3": Architecture(config=_gemma3, yarn=False),
    "phi3": Architecture(config=_phi3, partial=True, yarn=False, fused=True),
    "mistral3": Architecture(config=_mistral3, interleaved=True),
    "granite": Architecture(config=_granite, interleaved=True),
    "smollm3": Architecture(config=_smollm3, interleaved=True),
    "arcee": Architecture(config=_only("arcee"), interleaved=True, factors=True),
    "olmo2": Architecture(config=_olmo2),
    "nemotron": Architecture(config=_only("nemotron"), layer_norm="norm_eps", partial=True, yarn=False),
    "stablelm": Architecture(config=_stablelm, layer_norm="layer_norm_eps", partial=True, yarn=False),
    "cohere2": Architecture(config=_cohere2, interleaved=True, layer_norm="layer_norm_eps", yarn=False),
    "glm4": Architecture(config=_only("glm4"), interleaved=True, partial=True, fused=True),
    "ernie4_5": Architecture(config=_only("ernie4_5"), interleaved=True),
    "exaone4": Architecture(config=_exaone4, factors=True, yarn=False),
    "seed_oss": Architecture(config=_only("seed_oss"), names={"post_attention_norm": "mlp_norm"}),
}
