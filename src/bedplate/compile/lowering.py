"""Structure → lowered program of symbols, from the cache if it is there."""

from __future__ import annotations

from collections.abc import Sequence

from bedplate.compile.cache import Entry, UnitCache
from bedplate.compile.stand_in import fixed_buffers, stand_in_decoder, structure_schemes
from bedplate.compile.symbols import executorch_keys, symbolize
from bedplate.compile.units import LayersDifferError, Lowered, Structure, versions
from bedplate.compile.vocabulary import few_rows
from bedplate.compile.xnnpack import lower
from bedplate.executorch_1_5 import PTEFile, deserialize_pte_binary, serialize_pte_binary
from bedplate.quantize.foundation import fixed_constants
from bedplate.quantize.plan import layer_difference
from bedplate.spec import LayerSpec


def lowered_units(structure: Structure, cache: UnitCache) -> Lowered:
    """The lowered short model of this structure.

    Raises LoweringError, and LayersDifferError if no short model can stand for it.
    """
    schemes = structure_schemes(structure)
    if difference := layer_difference(schemes):
        raise LayersDifferError(difference)
    fingerprint = structure.fingerprint(versions(), any_depth=True)
    entry = cache.load("units", fingerprint)
    if entry is not None:
        program = deserialize_pte_binary(entry.program).program
        return Lowered(program=program, symbols=tuple(entry.facts), fixed=entry.fixed)
    lowered = compile_structure(structure, structure.unit_layers)
    data = bytes(serialize_pte_binary(PTEFile(program=lowered.program)))
    cache.store("units", fingerprint, Entry(program=data, fixed=lowered.fixed, facts=lowered.symbols))
    return lowered


def compile_structure(structure: Structure, layers: Sequence[LayerSpec]) -> Lowered:
    """Lower the structure with these layers: some seconds, and one or two for each layer. Raises LoweringError."""
    vocabulary = few_rows(structure)
    decoder, constants = stand_in_decoder(vocabulary.structure, layers)
    fixed = fixed_constants(structure.spec, structure.max_context, structure.max_chunk)
    symbol_of = executorch_keys({**constants, **fixed})
    with vocabulary.in_delegates():
        raw = lower(decoder, max_chunk=structure.max_chunk, symbol_of=symbol_of)
    vocabulary.widen_program(raw.program)
    return symbolize(raw, constants, fixed, fixed_buffers(decoder))
