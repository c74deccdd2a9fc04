"""What a lowering took is free when it has ended, though caches of torch and ExecuTorch keep its graphs."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from small_spec import SPEC
from torch._subclasses import FakeTensor

from bedplate.compile import static
from bedplate.compile.lowering import compile_structure
from bedplate.compile.units import StaticShapes, Structure
from bedplate.quantize.recipe import make_recipe
from bedplate.spec import linear_shapes

CONTEXT = 16
SHAPES = StaticShapes(prefill=4, decode=1, split_heads=False)


def held_bytes() -> int:
    """Of all tensors that have a storage of values, and of all constants of delegates."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [
        one
        for one in objects
        if issubclass(type(one), torch.Tensor)
        and not issubclass(type(one), FakeTensor)
        and one.layout is torch.strided  # not the sparse ones of other tests
    ]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    delegates = [one for one in objects if type(one) is NamedDataStoreOutput]
    return sum(storages.values()) + sum(len(data) for one in delegates for data in one.buffers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["program", "fixed shapes"])
def test_no_weights_are_held(kind: str) -> None:
    spec = replace(SPEC, layers=SPEC.layers[:1])
    recipe = make_recipe("none")  # it is lowered sooner
    structure = Structure(spec=spec, recipe=recipe, max_context=CONTEXT, max_chunk=CONTEXT, ranks={})
    before = held_bytes()
    if kind == "program":
        compile_structure(structure, spec.layers)
    else:
        static.compile_static(structure, SHAPES)
    weights = sum(4 * rows * columns for rows, columns in linear_shapes(spec).values())
    assert held_bytes() - before < weights / 10
