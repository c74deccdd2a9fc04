"""The dimensions of a decoder, as a bundle keeps them."""

from __future__ import annotations

import json
from dataclasses import replace

from small_spec import SPEC

from bedplate.bundle import strict_json
from bedplate.spec import Llama3Scaling, ModelSpec, RopeSpec


def test_a_dict_of_the_spec_gives_it_back() -> None:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    for spec in (SPEC, replace(SPEC, rope=RopeSpec(theta=5e5, scaling=scaling))):
        stored = json.loads(json.dumps(spec.to_dict()))
        assert strict_json.decode(ModelSpec, stored, "model") == spec
