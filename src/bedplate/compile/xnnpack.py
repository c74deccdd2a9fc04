"""torch.export and lowering: the one place with partition policy.

One XnnpackPartitioner with all its configs puts dynamically quantized linears and fp32 operators in the same
delegate; the decoder is written so that nothing else is needed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import is_dequant
from executorch.backends.xnnpack.utils.utils import get_input_node
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
    with _quiet(), lean_delegates(symbol_of) as joined:
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
    program = executorch._emitter_output.program
    return RawProgram(program=program, delegate_data=data, joined=frozenset(joined))


class AnyLinearConfig(LinearConfig):  # type: ignore[misc]
    """ExecuTorch's linears, and one more that XNNPACK computes: float32 inputs, weights of 8 bits."""

    def _detect_precision(self, node: torch.fx.Node) -> ConfigPrecisionType:
        if not is_dequant(get_input_node(node, self.act_idx)):
            return ConfigPrecisionType.FP32
        return super()._detect_precision(node)

    def _get_weight_deps(
        self, node: torch.fx.Node, ep: ExportedProgram, precision: ConfigPrecisionType
    ) -> tuple[bool, list[torch.fx.Node]]:
        weight = get_input_node(node, self.weight_idx)
        if precision == ConfigPrecisionType.FP32 and is_dequant(weight):
            return True, [weight, *weight.all_input_nodes]
        return super()._get_weight_deps(node, ep, precision)  # type: ignore[no-any-return]


def partitioner() -> XnnpackPartitioner:
    """The partitioner of all programs: all of XNNPACK's configs, one preprocessing pass."""
    chosen = XnnpackPartitioner(
        [AnyLinearConfig if config is LinearConfig else config for config in ALL_PARTITIONER_CONFIGS]
    )
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
