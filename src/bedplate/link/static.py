"""Structure and shapes → the template of a program of fixed shapes, from the cache if it is there.

As in `link.template`, only what the cache does not know makes these functions import torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict

from bedplate.compile.cache import Entry, UnitCache
from bedplate.compile.units import StaticShapes, Structure, placeholder, versions
from bedplate.link.linker import Metadata, Template

_KIND = "static"


def is_static_compiled(
    structure: Structure, shapes: StaticShapes, metadata: Metadata, cache: UnitCache
) -> bool:
    """Whether the cache has the structure's template for these shapes."""
    return cache.has(_KIND, _fingerprint(structure, shapes, metadata))


def load_static_template(
    structure: Structure, shapes: StaticShapes, metadata: Metadata, cache: UnitCache
) -> Template | None:
    """The template, if the cache has it."""
    entry = cache.load(_KIND, _fingerprint(structure, shapes, metadata))
    if entry is None:
        return None
    holes = {symbol: tuple(offsets) for symbol, offsets in entry.facts.items()}
    return Template(data=entry.program, holes=holes, fixed=entry.fixed)


def make_static_template(
    structure: Structure, shapes: StaticShapes, metadata: Metadata, cache: UnitCache
) -> Template:
    """Lower every layer, and keep the result. Raises LoweringError."""
    from bedplate.compile.static import compile_static
    from bedplate.executorch_1_5 import PTEFile, serialize_pte_binary
    from bedplate.link.methods import metadata_methods

    lowered = compile_static(structure, shapes)
    program = copy.copy(lowered.program)
    program.execution_plan = [*program.execution_plan, *metadata_methods(metadata)]
    data = bytes(serialize_pte_binary(PTEFile(program=program)))
    symbol_of = {placeholder(symbol): symbol for symbol in lowered.symbols}
    template = Template.find_holes(data, symbol_of, fixed=lowered.fixed)
    entry = Entry(program=template.data, fixed=template.fixed, facts=template.holes)
    cache.store(_KIND, _fingerprint(structure, shapes, metadata), entry)
    return template


def _fingerprint(structure: Structure, shapes: StaticShapes, metadata: Metadata) -> str:
    fingerprint = structure.fingerprint(versions(), any_depth=False)
    content = json.dumps([fingerprint, asdict(shapes), dict(metadata)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
