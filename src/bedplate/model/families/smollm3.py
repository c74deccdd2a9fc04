"""SmolLM3: some layers do not turn q and k."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family, decoder, layer_kinds, turning
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    turns = _turning_layers(config)
    slides = config.flag("use_sliding_window") and config.get("sliding_window") is not None
    spec = decoder(config, SMOLLM3, kinds=layer_kinds(config, lambda index: slides and not turns[index]))
    bias = config.flag("attention_bias")
    return replace(
        spec,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        layers=turning(spec, turns),
    )


def _turning_layers(config: Fields) -> list[bool]:
    """`no_rope_layers` has a 1 for each layer that turns. Where it is missing, every fourth does not."""
    n_layers, given = config.count("num_hidden_layers"), config.get("no_rope_layers")
    if given is None:
        every = config.count("no_rope_layer_interval")
        return [(index + 1) % every != 0 for index in range(n_layers)]
    if not isinstance(given, list) or len(given) < n_layers or not all(one in (0, 1) for one in given):
        raise config.wrong("no_rope_layers", f"a list of 0 or 1, as many as num_hidden_layers = {n_layers}")
    return [bool(one) for one in given[:n_layers]]


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "tie_word_embeddings": True,
    },
    read=_read,
)
