"""Ministral 3: queries grow with their positions."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import NEVER, Family, all_slide, decoder, positions
from bedplate.model.fields import Fields
from bedplate.model.rope_config import MOST_POSITIONS, Rules
from bedplate.spec import ModelSpec, QueryGrowth

_ROPE = {
    "type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _read(config: Fields) -> ModelSpec:
    config.only("original_max_position_embeddings", None, hint=NEVER)
    if config.get("rope_parameters") is None:
        config = Fields({**config.values, "rope_parameters": _ROPE}, config.where)
    spec = decoder(config, MINISTRAL3, kinds=all_slide(config))
    name = "rope_scaling" if config.section("rope_scaling") else "rope_parameters"
    fields = Fields(config.section(name), config.where, name)
    original = fields.count(
        "original_max_position_embeddings", default=positions(config), most=MOST_POSITIONS
    )
    growth = QueryGrowth(beta=fields.factor("llama_4_scaling_beta"), original_positions=original)
    return replace(spec, query_growth=growth)


MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    read=_read,
    rope=Rules(also=("llama_4_scaling_beta", "max_position_embeddings")),
)
