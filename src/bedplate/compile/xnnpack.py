"""torch.export and lowering to XNNPACK."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import ExecutorchBackendConfig
from torch.export import Dim, ExportedProgram

from bedplate.compile.delegate_graph import lean_delegates
from bedplate.compile.report import check_lowering
from bedplate.executorch_1_5 import emitted, forget_weights, partitioner, to_delegates, to_program
from bedplate.model.decoder import Decoder, register_operators
from bedplate.quiet import rare_collections


@dataclass(frozen=True, kw_only=True, eq=False)
class RawProgram:
    """What ExecuTorch's lowering gives.

    program: `executorch.exir.schema.Program`. delegate_data: the delegates' constants by ExecuTorch's own keys, as
    they were before some were joined. joined: symbols of constants that delegates name by their placeholders.
    """

    program: Any
    delegate_data: dict[str, bytes]
    joined: frozenset[str]


def lower(decoder: Decoder, *, max_chunk: int, symbol_of: Mapping[str, str]) -> RawProgram:
    """Export `decoder` for 1 … max_chunk tokens a call and lower it. Takes seconds a layer. Raises LoweringError.

    symbol_of: symbols of the decoder's constants by ExecuTorch's keys.
    """
    register_operators()
    with exporting(), lean_delegates(symbol_of) as joined:
        edge = to_delegates({"forward": _export(decoder, max_chunk)}, partitioner())
        check_lowering(edge.exported_program().graph_module, n_layers=len(decoder.layers))
        # external_constants: weights outside of delegates get names instead of places in the file.
        lowered = to_program(
            edge, ExecutorchBackendConfig(external_constants=True, emit_mutable_buffer_names=True)
        )
    program, data = emitted(lowered)
    forget_weights(edge)
    return RawProgram(program=program, delegate_data=data, joined=frozenset(joined))


def _export(decoder: Decoder, max_chunk: int) -> ExportedProgram:
    tokens = torch.zeros(1, min(5, max_chunk), dtype=torch.int64)
    position, last_rows = torch.zeros(1, dtype=torch.int64), torch.zeros(min(3, max_chunk), dtype=torch.int64)
    length, rows = Dim("length", min=1, max=max_chunk), Dim("rows", min=1, max=max_chunk)
    with torch.no_grad():
        return torch.export.export(
            decoder,
            (tokens, position, last_rows),
            dynamic_shapes=({1: length}, None, {0: rows}),
            strict=False,
        )


@contextmanager
def exporting() -> Iterator[None]:
    """In this context, the exporter says nothing, and Python rarely looks for cycles: a graph is a million objects."""
    # The exporter's own warnings speak of its internals; what a user must know is raised by `report`.
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings(), rare_collections():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
