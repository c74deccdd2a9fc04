"""OLMo 3: as OLMo 2, with windows and a rotary embedding by the kind of layer."""

from __future__ import annotations

from bedplate.model.families.common import (
    FULL,
    NORMS_AFTER,
    SLIDING,
    Family,
    layer_kinds,
    positions,
    width_of_heads,
)
from bedplate.model.families.olmo2 import OLMO2, read_normed_after
from bedplate.model.fields import Fields
from bedplate.model.rope_config import read_rope_by_kind
from bedplate.spec import ModelSpec

_THETA = 500000.0


def _read(config: Fields) -> ModelSpec:
    kinds = layer_kinds(config, lambda index: (index + 1) % 4 != 0)
    # A theta of the top level is of the layers that see everything.
    thetas = {FULL: config.number("rope_theta"), SLIDING: _THETA}
    rope = read_rope_by_kind(config, thetas, head_dim=width_of_heads(config), max_positions=positions(config))
    return read_normed_after(config, OLMO3, kinds, rope)


OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "rope_theta": _THETA, "sliding_window": 4096, "layer_types": None},
    read=_read,
    modules=NORMS_AFTER,
)
