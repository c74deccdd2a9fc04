"""Everything private in ExecuTorch that compile and link use, as it is in version 1.5.

Whoever upgrades ExecuTorch edits this file, and renames it. Its test exercises every name. Importing it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# Registers the operators of quantized embeddings in torch: `embedding_byte`, `embedding_4bit`.
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    PerChannelGroupQuant,
    XNNAdd,
    XNNConvert,
    XNNFullyConnected,
    XNNGraph,
    XNNMultiply,
    XNNStaticReshape,
    XNNStaticSlice,
    XNode,
)
from executorch.backends.xnnpack.utils.quant_utils import is_dequant
from executorch.backends.xnnpack.utils.utils import get_input_node
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX, XNN_INVALID_VALUE_ID
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchProgramManager
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.program._program import _generate_edge_program, _remove_invalid_ops_for_not_decompose
from executorch.exir.schema import (
    Bool,
    Buffer,
    Chain,
    ContainerMetadata,
    EValue,
    ExecutionPlan,
    Int,
    Null,
    Program,
    TensorDataLocation,
)
from executorch.exir.tracer import _default_decomposition_table
from torch.export import ExportedProgram

__all__ = [
    "EDGE_CONFIG",
    "UINT64_MAX",
    "XNN_INVALID_VALUE_ID",
    "Bool",
    "Buffer",
    "Chain",
    "ConstantDataOffset",
    "ContainerMetadata",
    "DataEntry",
    "EValue",
    "ExecutionPlan",
    "Int",
    "MemoryPlanningPass",
    "NamedDataStoreOutput",
    "Null",
    "PTEFile",
    "Partitioner",
    "PerChannelGroupQuant",
    "TensorDataLocation",
    "XNNAdd",
    "XNNConvert",
    "XNNFullyConnected",
    "XNNGraph",
    "XNNMultiply",
    "XNNStaticReshape",
    "XNNStaticSlice",
    "XNode",
    "delegate_graphs",
    "deserialize_pte_binary",
    "emitted",
    "executorch_call_delegate",
    "partitioner",
    "serialize_pte_binary",
    "to_delegates",
]

EDGE_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


class AnyLinearConfig(LinearConfig):  # type: ignore[misc]
    """ExecuTorch's linears, and one more kind that XNNPACK computes: float32 inputs and 8-bit weights."""

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
    """The partitioner of all programs: all of XNNPACK's configs, one preprocessing pass.

    It puts dynamically quantized linears and fp32 operators in the same delegate; the decoder is written so that
    nothing else is needed.
    """
    chosen = XnnpackPartitioner(
        [AnyLinearConfig if config is LinearConfig else config for config in ALL_PARTITIONER_CONFIGS]
    )
    # XNNPACK's preprocessing runs 17 passes over each delegate, of which our graphs need one: the spec asks for
    # that one alone. The delegates are the same to the byte, in half the time.
    chosen.delegation_spec = DelegationSpec("XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")])
    return chosen


def to_delegates(programs: Mapping[str, ExportedProgram], chosen: Partitioner) -> EdgeProgramManager:
    """What `to_edge_transform_and_lower` gives, to the byte, in half the time.

    That one decomposes a program three times: some operators, for which the partitioner asks, are then left whole only
    where it really takes them. Of our programs it takes them all, or `compile.report` finds those that are left.
    """
    edges, whole = {}, set[torch._ops.OpOverload]()
    for name, program in programs.items():
        kept = _remove_invalid_ops_for_not_decompose(chosen.ops_to_not_decompose(program)[0])
        table = _default_decomposition_table()
        for operator in kept:
            table.pop(operator, None)
        decomposed = program.run_decompositions(table)
        edges[name] = _generate_edge_program(EDGE_CONFIG, decomposed, preserve_ops=kept)
        whole.update(kept)
    manager = EdgeProgramManager(edges, None, EDGE_CONFIG, list(whole))
    return manager.to_backend(dict.fromkeys(programs, chosen))


@contextmanager
def delegate_graphs(edit: Callable[[XNNGraph], None]) -> Iterator[None]:
    """In this context, `edit` gets the graph of each delegate before XNNPACK's preprocessing writes it."""
    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def serialize_edited(graph: XNNGraph, constant_data: bytearray) -> bytes:
        edit(graph)
        return serialize(graph, constant_data)  # type: ignore[no-any-return]

    xnnpack_preprocess.serialize_xnnpack_binary = serialize_edited
    try:
        yield
    finally:
        xnnpack_preprocess.serialize_xnnpack_binary = serialize


def emitted(lowered: ExecutorchProgramManager) -> tuple[Program, dict[str, bytes]]:
    """The program before it is serialized, and its delegates' constants by ExecuTorch's keys."""
    named = lowered._named_data
    data = {key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()}
    return lowered._emitter_output.program, data
