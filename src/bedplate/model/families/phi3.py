"""Phi 3 and Phi 4 mini: q, k and v in one linear, gate and up in another."""

from __future__ import annotations

from bedplate.model.families.common import NORMS_BEFORE, Family, all_slide, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rules
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    return decoder(config, PHI3, kinds=all_slide(config))


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
    },
    read=_read,
    modules={
        **NORMS_BEFORE,
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    # What early configs call su or yarn is longrope.
    rope=Rules(
        partial=True,
        types={"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")},
    ),
)
