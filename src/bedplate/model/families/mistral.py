"""Mistral: a window of all layers. A config without `sliding_window` has one of 4,096; null means none."""

from __future__ import annotations

from bedplate.model.families.common import Family, all_slide, decoder
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    return decoder(config, MISTRAL, kinds=all_slide(config))


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    read=_read,
)
