"""Programs of fixed shapes: torch.export, and lowering to whatever backend a partitioner stands for.

`lower_static` makes a program of any decoder for any backend. `compile_static` makes the one that a bundle holds: for
XNNPACK, of symbols, so that it shares its constants with the other programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from torch.export import ExportedProgram

from bedplate.compile.delegate_graph import lean_delegates
from bedplate.compile.report import check_delegates
from bedplate.compile.stand_in import fixed_buffers, stand_in_decoder
from bedplate.compile.symbols import executorch_keys, symbolize
from bedplate.compile.units import Lowered, StaticShapes, Structure
from bedplate.compile.xnnpack import RawProgram, exporting
from bedplate.executorch_1_5 import (
    EDGE_CONFIG,
    MemoryPlanningPass,
    Partitioner,
    emitted,
    forget_weights,
    partitioner,
    to_delegates,
    to_program,
)
from bedplate.model.decoder import Decoder
from bedplate.model.static_attention import StaticDecoder
from bedplate.quantize.foundation import fixed_constants

PREFILL, DECODE = "prefill", "decode"
# Lookups of tokens, of positions and of the row that goes to the head.
_OUTSIDE = (
    "aten.embedding",
    "quantized_decomposed.embedding_byte",
    "quantized_decomposed.embedding_4bit",
    "aten.index_select",
)


def lower_static(
    decoder: Decoder, shapes: StaticShapes, partitioners: Sequence[Partitioner]
) -> EdgeProgramManager:
    """The methods `prefill` and `decode` of a decoder, lowered to the backends of `partitioners`.

    Without partitioners, all is left to ExecuTorch's own operators. `to_executorch()` gives the program.
    """
    with exporting():
        return to_edge_transform_and_lower(
            _methods(decoder, shapes), partitioner=list(partitioners), compile_config=EDGE_CONFIG
        )


def _methods(decoder: Decoder, shapes: StaticShapes) -> dict[str, ExportedProgram]:
    return {
        PREFILL: _export(decoder, shapes.prefill, shapes, one_row=True),
        DECODE: _export(decoder, shapes.decode, shapes, one_row=False),
    }


def _export(decoder: Decoder, length: int, shapes: StaticShapes, *, one_row: bool) -> ExportedProgram:
    static = StaticDecoder(decoder, length=length, one_row=one_row, split_heads=shapes.split_heads).eval()
    with torch.no_grad():
        return torch.export.export(static, static.example(), strict=False)


def compile_static(structure: Structure, shapes: StaticShapes) -> Lowered:
    """Lower all layers of the structure to XNNPACK: seconds for each layer. Raises LoweringError."""
    decoder, constants = stand_in_decoder(structure, structure.spec.layers)
    fixed = fixed_constants(structure.spec, structure.max_context, structure.max_chunk)
    with lean_delegates(executorch_keys({**constants, **fixed})) as joined:
        with exporting():
            edge = to_delegates(_methods(decoder, shapes), partitioner())
        # One delegate computes all layers. The head of a prefill is another: it reads one row.
        for method, delegates in ((PREFILL, 2), (DECODE, 1)):
            check_delegates(edge.exported_program(method).graph_module, _OUTSIDE, delegates)
        with exporting():
            lowered = to_program(
                edge,
                ExecutorchBackendConfig(
                    external_constants=True,
                    # Caches are read where the host keeps them.
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                ),
            )
    program, data = emitted(lowered)
    forget_weights(edge)
    raw = RawProgram(program=program, delegate_data=data, joined=frozenset(joined))
    buffers = fixed_buffers(StaticDecoder(decoder, length=1, one_row=False, split_heads=False))
    return symbolize(raw, constants, fixed, buffers)
