"""Everything private in ExecuTorch that compile and link use, as it is in version 1.5.

Whoever upgrades ExecuTorch edits this file, and renames it. Its test exercises every name. Importing it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Registers the operators of quantized embeddings in torch: `embedding_byte`, `embedding_4bit`.
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes.convert_to_linear import ConvertToLinearPass
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
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
)
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.pass_base import ExportPass, NodeMetadata, PassResult, ProxyValue
from executorch.exir.passes import MemoryPlanningPass, spec_prop_pass
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import (
    ReplaceBrokenOpsWithFunctionalOpsPass,
)
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.sym_to_tensor_pass import SymToTensorPass
from executorch.exir.program import _program
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
from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import (
    _NON_FUNCTIONAL_OPS_TO_FUNCTIONAL_OPS,
    get_view_copy_of_view_op,
)
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
    "forget_weights",
    "partitioner",
    "serialize_pte_binary",
    "to_delegates",
    "to_program",
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
        with _few_interpretations():
            edges[name] = _generate_edge_program(EDGE_CONFIG, decomposed, preserve_ops=kept)
        whole.update(kept)
    manager = EdgeProgramManager(edges, None, EDGE_CONFIG, list(whole))
    with _replaced(xnnpack_preprocess, "ConvertToLinearPass", _LinearsIfNeeded):
        lowered = manager.to_backend(dict.fromkeys(programs, chosen))
    # The config is lost on the way. It says that orders of dimensions are no matter: one more pass over the graph.
    lowered.compile_config = EDGE_CONFIG
    return lowered


def to_program(delegates: EdgeProgramManager, config: ExecutorchBackendConfig) -> ExecutorchProgramManager:
    """What `to_executorch` of `to_delegates` gives, to the byte, in a third of the time."""
    with _replaced(spec_prop_pass, "ExportPass", _AsItIs):
        return delegates.to_executorch(config)


@contextmanager
def _replaced(module: ModuleType, name: str, by: object) -> Iterator[None]:
    """In this context, `module` has something else by this name."""
    before = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, before)


class _LinearsIfNeeded(ConvertToLinearPass):  # type: ignore[misc]
    """The pass of `partitioner`, where a delegate has products that it makes linears. It interprets the graph anew."""

    def call(self, module: torch.fx.GraphModule) -> PassResult:
        found = any(node.target in self.targets for node in module.graph.nodes)
        return super().call(module) if found else PassResult(module, False)


class _AsItIs:
    """In place of a pass that computes anew what each node gives, delegates too: `to_delegates` has left it right."""

    def __call__(self, module: torch.fx.GraphModule) -> PassResult:
        # Another module of the same graph: ExecuTorch takes all out of the old one before it copies the new one.
        same = torch.fx.GraphModule(module, module.graph)
        same.meta = module.meta.copy()
        return PassResult(same, False)


# These passes change calls of operators, and nothing else. To run one is to interpret the whole graph.
_OF_OPERATORS = (
    NormalizeTransposePass,
    RemoveMixedTypeOperators,
    ReplaceBrokenOpsWithFunctionalOpsPass,
    ScalarToTensorPass,
    SymToTensorPass,
)


@contextmanager
def _few_interpretations() -> Iterator[None]:
    """In this context, a pass of operators runs only on a graph that it changes, and views become copies in place."""
    all_passes = _program._get_aten_to_edge_passes

    def needed_passes(config: EdgeCompileConfig) -> tuple[list[Any], list[Any]]:
        before, after = all_passes(config)
        inner = [getattr(one, "__wrapped__", one) for one in before]
        return [_IfNeeded(one) if isinstance(one, _OF_OPERATORS) else one for one in inner], after

    with (
        _replaced(_program, "_get_aten_to_edge_passes", needed_passes),
        _replaced(_program, "ReplaceViewOpsWithViewCopyOpsPass", _CopiesOfViews),
    ):
        yield


class _CopiesOfViews:
    """`ReplaceViewOpsWithViewCopyOpsPass`, less its look at what each operator then gives: later passes take one."""

    def __call__(self, module: torch.fx.GraphModule) -> PassResult:
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                for node in part.graph.nodes:
                    if isinstance(node.target, torch._ops.OpOverload):
                        node.target = _copying(node.target)
                part.recompile()
        return PassResult(module, True)


def _copying(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    functional = _NON_FUNCTIONAL_OPS_TO_FUNCTIONAL_OPS.get(operator)
    return functional or get_view_copy_of_view_op(operator._schema) or operator


class _IfNeeded:
    def __init__(self, of_operators: ExportPass) -> None:
        self._pass = of_operators

    def __call__(self, module: torch.fx.GraphModule) -> PassResult:
        return self._pass(module) if changes_operators(self._pass, module) else PassResult(module, False)


def changes_operators(one: ExportPass, module: torch.fx.GraphModule) -> bool:
    """Whether a pass of operators makes other calls than those in a graph.

    It is asked for each call, and does not compute: that is what takes time.
    """
    if any(isinstance(child, torch.fx.GraphModule) for child in module.children()):
        return True  # of a condition or a loop: nobody looks into it here
    made: list[tuple[Any, ...]] = []
    one._fx = lambda _, *call: made.append(call[:3])
    try:
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                made.clear()
                args, kwargs = torch.fx.map_arg(
                    (node.args, node.kwargs), lambda given: ProxyValue(given.meta.get("val"), given)
                )
                one.call_operator(node.target, args, kwargs, NodeMetadata(node.meta))
                if len(made) != 1 or not _same(made[0], (node.target, args, kwargs)):
                    return True
    finally:
        del one._fx
    return False


def _same(call: object, other: object) -> bool:
    """True only for what is the same in type and value: a tensor of one number equals the number."""
    if isinstance(call, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(call) == len(other) and all(map(_same, call, other))
    if isinstance(call, dict) and isinstance(other, dict):
        return call.keys() == other.keys() and all(_same(call[name], other[name]) for name in call)
    if call is other:
        return True
    return type(call) is type(other) and not isinstance(call, (torch.Tensor, ProxyValue)) and call == other


@contextmanager
def delegate_graphs(edit: Callable[[XNNGraph], None]) -> Iterator[None]:
    """In this context, `edit` gets the graph of each delegate before XNNPACK's preprocessing writes it."""
    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def serialize_edited(graph: XNNGraph, constant_data: bytearray) -> bytes:
        edit(graph)
        return serialize(graph, constant_data)  # type: ignore[no-any-return]

    with _replaced(xnnpack_preprocess, "serialize_xnnpack_binary", serialize_edited):
        yield


def emitted(lowered: ExecutorchProgramManager) -> tuple[Program, dict[str, bytes]]:
    """The program before it is serialized, and its delegates' constants by ExecuTorch's keys."""
    named = lowered._named_data
    data = {key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()}
    return lowered._emitter_output.program, data


def forget_weights(edge: EdgeProgramManager) -> None:
    """Take the weights out of a lowered program that is no longer needed.

    Caches of torch and ExecuTorch keep its graphs, and with them its delegates, as long as the process runs.
    """
    for name in edge.methods:
        for module in edge.exported_program(name).graph_module.modules():
            if isinstance(module, LoweredBackendModule):
                module.original_module.state_dict.clear()
                module.original_module.constants.clear()
                module.named_data_store_output.buffers.clear()
