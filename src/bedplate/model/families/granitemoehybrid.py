"""Granite 4, dense: of the hybrid architecture, models without experts whose layers all have attention."""

from __future__ import annotations

from dataclasses import replace

from bedplate.errors import UnsupportedError
from bedplate.model.families.common import FULL, NORMS_BEFORE, Family, layer_kinds, turning
from bedplate.model.families.granite import GRANITE, read_multiplied
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec

_HINT = "only models whose layers all have attention, and that have no experts, are supported"


def _read(config: Fields) -> ModelSpec:
    config.only("num_local_experts", 0, hint=_HINT)
    name = "layers_block_type" if "layers_block_type" in config.values else "layer_types"
    n_layers = config.count("num_hidden_layers")
    if config.get(name) is None:
        raise UnsupportedError(
            f"without layer_types or layers_block_type, all layers (num_hidden_layers = {n_layers}) are Mamba layers",
            where=config.where,
            hint=_HINT,
        )
    if set(layer_kinds(config, lambda index: False, name)) != {FULL}:
        raise config.wrong(name, f"a list of {FULL}")
    spec = read_multiplied(config, GRANITEMOEHYBRID, hidden="shared_intermediate_size")
    turns = config.get("position_embedding_type") == "rope"
    return spec if turns else replace(spec, ropes=(), layers=turning(spec, [False] * spec.n_layers))


GRANITEMOEHYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    defaults={
        **GRANITE.defaults,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
        "position_embedding_type": None,
        "layer_types": None,
    },
    read=_read,
    modules={
        **NORMS_BEFORE,
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
        "shared_mlp.output_linear": ("mlp.down_proj",),
    },
)
