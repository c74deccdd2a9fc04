"""StableLM: layer norms, a quarter of each head turns, and an MLP that may read what attention reads."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import NEVER, Family, decoder, width_of_heads
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    config.only("qk_layernorm", False, hint=NEVER)
    by_size = width_of_heads(Fields({**config.values, "head_dim": None}, config.where))
    config.only("head_dim", None, by_size, hint="heads are as wide as they fit into hidden_size")
    spec, parallel = decoder(config, STABLELM, eps="layer_norm_eps"), config.flag("use_parallel_residual")
    return replace(
        spec,
        norm="layer",
        norm_bias=True,
        norms=("attention_norm",) if parallel else spec.norms,
        parallel=parallel,
        qkv_bias=config.flag("use_qkv_bias"),
    )


STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    read=_read,
    rope=Rules(partial=True),
)
