"""Qwen 2 and 2.5: biases of q, k and v, and windows in the last layers."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder, layer_kinds
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def read_windowed(config: Fields, family: Family) -> ModelSpec:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window. Without it, none has."""
    window = config.get("sliding_window") if config.flag("use_sliding_window") else None
    first = config.count("max_window_layers", least=0)
    kinds = layer_kinds(config, lambda index: window is not None and index >= first)
    return decoder(Fields({**config.values, "sliding_window": window}, config.where), family, kinds=kinds)


def _read(config: Fields) -> ModelSpec:
    return replace(read_windowed(config, QWEN2), qkv_bias=True)


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    read=_read,
)
