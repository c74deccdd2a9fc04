"""Ministral: windows by the kind of layer."""

from __future__ import annotations

from bedplate.model.families.common import Family, decoder, layer_kinds
from bedplate.model.families.mistral import MISTRAL
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    has_window = config.get("sliding_window") is not None
    return decoder(config, MINISTRAL, kinds=layer_kinds(config, lambda index: has_window))


MINISTRAL = Family(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    defaults={**MISTRAL.defaults, "layer_types": None},
    read=_read,
)
