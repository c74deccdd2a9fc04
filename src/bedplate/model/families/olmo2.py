"""OLMo 2: norms after the halves of a layer only, and over all heads of q and of k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bedplate.model.families.common import AFTER, NORMS_AFTER, Family, decoder
from bedplate.model.fields import Fields
from bedplate.model.rope_config import Rope
from bedplate.spec import ModelSpec


def read_normed_after(
    config: Fields, family: Family, kinds: Sequence[str] | None = None, rope: Rope | None = None
) -> ModelSpec:
    """What OLMo 2 and 3 have in common."""
    bias = config.flag("attention_bias")
    return replace(
        decoder(config, family, kinds=kinds, rope=rope),
        norms=AFTER,
        qk_norm="whole",
        qkv_bias=bias,
        output_bias=bias,
    )


def _read(config: Fields) -> ModelSpec:
    return read_normed_after(config, OLMO2)


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    read=_read,
    modules=NORMS_AFTER,
)
