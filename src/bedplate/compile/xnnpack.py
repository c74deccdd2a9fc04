"""torch.export and lowering: the one place with partition policy.

One XnnpackPartitioner with all its configs puts dynamically quantized linears and fp32 operators in the same
delegate; the decoder is written so that nothing else is needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from torch.export import Dim, ExportedProgram

from bedplate.compile.delegate_graph import lean_delegates
from bedplate.compile.report import check_lowering
from bedplate.model.decoder import Decoder, register_operators


@dataclass(frozen=True, kw_only=True, eq=False)
class RawProgram:
    """What ExecuTorch's lowering gives.

    program: `executorch.exir.schema.Program`. delegate_data: the delegates' constants by ExecuTorch's own keys.
    """

    program: Any
    delegate_data: dict[str, bytes]


def lower(decoder: Decoder, *, max_chunk: int) -> RawProgram:
    """Export `decoder` for 1 … max_chunk tokens a call and lower it. Takes seconds a layer. Raises LoweringError."""
    register_operators()
    with _quiet(), lean_delegates():
        exported = _export(decoder, max_chunk)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        check_lowering(edge.exported_program().graph_module, n_layers=len(decoder.layers))
        # external_constants: weights outside of delegates get names instead of places in the file.
        executorch = edge.to_executorch(
            ExecutorchBackendConfig(external_constants=True, emit_mutable_buffer_names=True)
        )
    named = executorch._named_data
    data = {key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()}
    return RawProgram(program=executorch._emitter_output.program, delegate_data=data)


def partitioner() -> XnnpackPartitioner:
    """The partitioner of all programs: all of XNNPACK's configs, one preprocessing pass."""
    chosen = XnnpackPartitioner()
    # XNNPACK's preprocessing runs 17 passes over each delegate, of which our graphs need one: the spec asks for
    # that one alone. The delegates are the same to the byte, in half the time.
    chosen.delegation_spec = DelegationSpec("XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")])
    return chosen


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
def _quiet() -> Iterator[None]:
    # The exporter's own warnings speak of its internals; what a user must know is raised by `report`.
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
