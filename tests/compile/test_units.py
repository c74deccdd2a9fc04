"""The short model that is lowered, and which of its layers each layer of a model is like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_spec import SPEC

from bedplate.compile.units import Structure
from bedplate.quantize.recipe import make_recipe
from bedplate.spec import LayerSpec

CONTEXT = 16
PLAIN, NARROW, WIDE, STILL = (
    LayerSpec(rope=rope, window=window) for rope, window in ((0, None), (0, 4), (0, CONTEXT), (None, None))
)


def structure(*layers: LayerSpec) -> Structure:
    spec = replace(SPEC, layers=layers)
    return Structure(spec=spec, recipe=make_recipe("none"), max_context=CONTEXT, max_chunk=CONTEXT, ranks={})


@pytest.mark.parametrize(
    ("layers", "units", "like"),
    [
        ((PLAIN,), (PLAIN,), (0,)),
        ((PLAIN,) * 4, (PLAIN, PLAIN), (0, 1, 1, 1)),
        ((PLAIN, WIDE, PLAIN), (PLAIN, PLAIN), (0, 1, 1)),
        ((NARROW, PLAIN, PLAIN), (NARROW, PLAIN), (0, 1, 1)),
        ((NARROW, NARROW, PLAIN, NARROW), (NARROW, NARROW, PLAIN), (0, 1, 2, 1)),
        ((PLAIN, STILL, NARROW, PLAIN), (PLAIN, STILL, NARROW, PLAIN), (0, 1, 2, 3)),
    ],
)
def test_one_layer_of_each_kind_is_lowered(
    layers: tuple[LayerSpec, ...], units: tuple[LayerSpec, ...], like: tuple[int, ...]
) -> None:
    found = structure(*layers)
    assert (found.unit_layers, found.unit_of_layer) == (units, like)


def test_models_that_differ_in_their_files_alone_share_their_units() -> None:
    one, deeper = structure(NARROW, PLAIN), structure(NARROW, PLAIN, PLAIN)
    other = replace(one, spec=replace(one.spec, model_type="other", architecture="Other", max_positions=99))
    prints = [each.fingerprint({}, any_depth=True) for each in (one, deeper, other)]
    assert len(set(prints)) == 1
    assert structure(PLAIN, PLAIN).fingerprint({}, any_depth=True) not in prints
