"""Structure → template: the bytes of a `.pte` with holes where keys go, from the cache if it is there.

Only a structure that the cache does not know makes this module's functions import torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bedplate.compile.cache import Entry, UnitCache
from bedplate.compile.units import Lowered, Structure, placeholder, versions
from bedplate.link.linker import Template

if TYPE_CHECKING:
    from bedplate.link.methods import Metadata

# The longest run of positions that the `logits` method takes: their logits lie in the activation arena.
MAX_LOGITS = 64


def load_template(structure: Structure, metadata: Metadata, cache: UnitCache) -> Template | None:
    """The template of a structure, if the cache has it."""
    entry = cache.load("program", _fingerprint(structure, metadata))
    if entry is None:
        return None
    holes = {symbol: tuple(offsets) for symbol, offsets in entry.facts.items()}
    return Template(data=entry.program, holes=holes, fixed=entry.fixed)


def make_template(structure: Structure, metadata: Metadata, cache: UnitCache) -> Template:
    """Compile what the cache does not have, stretch it to the structure's depth, and keep the result.

    Raises LoweringError.
    """
    from bedplate.compile.lowering import lowered_units
    from bedplate.link.stretch import stretch

    template = template_of(stretch(lowered_units(structure, cache), structure.spec.n_layers), metadata)
    entry = Entry(program=template.data, fixed=template.fixed, facts=template.holes)
    cache.store("program", _fingerprint(structure, metadata), entry)
    return template


def template_of(lowered: Lowered, metadata: Metadata) -> Template:
    """Serialize the methods of a lowered program of full depth, and find where each symbol's key goes."""
    from executorch.exir._serialize._program import PTEFile, serialize_pte_binary

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


def _fingerprint(structure: Structure, metadata: Mapping[str, int | bool | Sequence[int]]) -> str:
    content = json.dumps(
        [structure.fingerprint(versions(), any_depth=False), dict(metadata), MAX_LOGITS], sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()
