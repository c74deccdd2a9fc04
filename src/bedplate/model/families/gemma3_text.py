"""Gemma 3, text: as Gemma 2, with norms of each head, and a rotary embedding for each kind of layer."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import (
    FULL,
    NEVER,
    SLIDING,
    Family,
    layer_kinds,
    positions,
    width_of_heads,
)
from bedplate.model.families.gemma2 import GEMMA2, SANDWICH, read_sandwich
from bedplate.model.fields import Fields
from bedplate.model.rope_config import read_rope_by_kind
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    config.only("attn_logit_softcapping", None, hint=NEVER)  # which transformers would ignore
    every = config.count("sliding_window_pattern")
    kinds = layer_kinds(config, lambda index: (index + 1) % every != 0)
    thetas = {FULL: config.number("rope_theta"), SLIDING: config.number("rope_local_base_freq")}
    rope = read_rope_by_kind(config, thetas, head_dim=width_of_heads(config), max_positions=positions(config))
    return replace(read_sandwich(config, GEMMA3_TEXT, kinds, rope), qk_norm="head")


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **GEMMA2.defaults,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    read=_read,
    modules=SANDWICH,
    norm_offset=1.0,
)
