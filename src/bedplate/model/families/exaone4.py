"""EXAONE 4: norms after the halves of a layer and of each head. With windows, only layers that have one turn."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import (
    AFTER,
    NORMS_AFTER,
    SLIDING,
    Family,
    decoder,
    layer_kinds,
    turning,
)
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    has_windows = config.get("sliding_window") is not None
    if has_windows and config.get("layer_types") is None:
        every = config.count("sliding_window_pattern")
        kinds = layer_kinds(config, lambda index: (index + 1) % every != 0)
    else:
        kinds = layer_kinds(config, lambda index: False)
    spec = decoder(config, EXAONE4, kinds=kinds)
    turns = [not has_windows or kind == SLIDING for kind in kinds]
    return replace(spec, layers=turning(spec, turns), norms=AFTER, qk_norm="head")


EXAONE4 = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "layer_types": None,
    },
    read=_read,
    modules=NORMS_AFTER,
)
