"""Structure → template: the bytes of a `.pte` with holes where keys go, from the cache if it is there.

Only a structure that the cache does not know makes this module's functions import torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable

from bedplate.compile.cache import Entry, UnitCache
from bedplate.compile.units import LayersDifferError, Lowered, Structure, placeholder, versions
from bedplate.link.linker import Metadata, Template

# The longest run of positions that the `logits` method takes: their logits lie in the activation arena.
MAX_LOGITS = 64


def is_compiled(structure: Structure, metadata: Metadata, cache: UnitCache) -> bool:
    """Whether the cache has the structure's template, or the units to make it of."""
    units = structure.fingerprint(versions(), any_depth=True)
    return cache.has("program", _fingerprint(structure, metadata)) or cache.has("units", units)


def load_template(structure: Structure, metadata: Metadata, cache: UnitCache) -> Template | None:
    """The template of a structure, if the cache has it."""
    entry = cache.load("program", _fingerprint(structure, metadata))
    if entry is None:
        return None
    holes = {symbol: tuple(offsets) for symbol, offsets in entry.facts.items()}
    return Template(data=entry.program, holes=holes, fixed=entry.fixed)


def make_template(
    structure: Structure, metadata: Metadata, cache: UnitCache, notice: Callable[[str], None]
) -> Template:
    """Compile what the cache does not have, link it to the structure's depth, and keep the result.

    notice: told if the whole model has to be lowered. Raises LoweringError.
    """
    template = template_of(lowered_program(structure, cache, notice), metadata)
    entry = Entry(program=template.data, fixed=template.fixed, facts=template.holes)
    cache.store("program", _fingerprint(structure, metadata), entry)
    return template


def lowered_program(structure: Structure, cache: UnitCache, notice: Callable[[str], None]) -> Lowered:
    """The lowered program of full depth: units stretched or, if the layers are not alike, the whole graph lowered."""
    from bedplate.compile.lowering import compile_structure, lowered_units
    from bedplate.link.stretch import stretch

    depth = structure.spec.n_layers
    try:
        return stretch(lowered_units(structure, cache), structure.unit_of_layer)
    except LayersDifferError as difference:
        notice(f"{difference}: all {depth} layers are lowered one by one, which takes seconds each")
        return compile_structure(structure, structure.spec.layers)


def template_of(lowered: Lowered, metadata: Metadata) -> Template:
    """Serialize the methods of a lowered program of full depth, and find where each symbol's key goes."""
    from bedplate.executorch_1_5 import PTEFile, serialize_pte_binary
    from bedplate.link.methods import forward_method, logits_method, metadata_methods

    program = copy.copy(lowered.program)
    plan = program.execution_plan[0]
    program.execution_plan = [
        forward_method(plan),
        logits_method(plan, max_rows=MAX_LOGITS),
        *metadata_methods({**metadata, "get_max_logits_len": MAX_LOGITS}),
    ]
    data = bytes(serialize_pte_binary(PTEFile(program=program)))
    symbol_of = {placeholder(symbol): symbol for symbol in lowered.symbols}
    return Template.find_holes(data, symbol_of, fixed=lowered.fixed)


def _fingerprint(structure: Structure, metadata: Metadata) -> str:
    content = json.dumps(
        [structure.fingerprint(versions(), any_depth=False), dict(metadata), MAX_LOGITS], sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()
