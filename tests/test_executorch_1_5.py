"""All that we use of ExecuTorch's private parts, in one lowering: what an upgrade must bring back to life."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.program._program import _get_aten_to_edge_passes
from stock import StockProgram
from torch import Tensor, nn
from torch.export import ExportedProgram

import bedplate
from bedplate import executorch_1_5 as private
from bedplate.constants import TENSOR, Constant
from bedplate.link.embed import embed
from bedplate.link.methods import metadata_methods
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.recipe import EIGHT_BIT, WEIGHT_ONLY, Scheme
from bedplate.quantize.weights import quantize_weight

TOKENS = torch.tensor([[3, 1, 2]])
CONFIG = ExecutorchBackendConfig(external_constants=True)


class Everything(nn.Module):
    """An embedding, linears of each kind, and the operators that our edits of graphs look for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = QuantizedEmbedding(quantize_weight(torch.randn(16, 64), EIGHT_BIT))
        self.four, self.eight = (
            QuantizedLinear(quantize_weight(torch.randn(64, 64), scheme))
            for scheme in (Scheme(bits=4, group_size=32), EIGHT_BIT)
        )
        self.weight_only = QuantizedLinear(quantize_weight(torch.randn(64, 32), WEIGHT_ONLY))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        heads = (self.four(x) + self.eight(x)).view(1, -1, 4, 16)
        return self.weight_only((heads[..., :8] * heads[..., 8:]).reshape(1, -1, 32))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def module() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module")
def graphs() -> list[private.XNNGraph]:
    """The delegates of `lowered`."""
    return []


@pytest.fixture(scope="module")
def lowered(module: Everything, graphs: list[private.XNNGraph]) -> tuple[private.Program, dict[str, bytes]]:
    exported = torch.export.export(module, (TOKENS,), strict=False)
    with private.delegate_graphs(graphs.append):
        edge = to_edge_transform_and_lower(
            exported, partitioner=[private.partitioner()], compile_config=private.EDGE_CONFIG
        )
        calls = [node.target for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        assert calls.count(private.executorch_call_delegate) == 1
        return private.emitted(edge.to_executorch(CONFIG))


def test_what_is_decomposed_once_is_what_executorch_gives(
    module: Everything, lowered: tuple[private.Program, dict[str, bytes]]
) -> None:
    exported = torch.export.export(module, (TOKENS,), strict=False)
    check_same(to_program(exported), lowered)


def test_so_it_is_for_any_number_of_tokens(module: Everything) -> None:
    """Where sizes are symbols, and a delegate ends where one is asked for."""
    length = torch.export.Dim("length", min=1, max=8)
    exported = torch.export.export(module, (TOKENS,), dynamic_shapes=({1: length},), strict=False)
    stock = to_edge_transform_and_lower(
        exported, partitioner=[private.partitioner()], compile_config=private.EDGE_CONFIG
    )
    check_same(to_program(exported), private.emitted(stock.to_executorch(CONFIG)))


def to_program(exported: ExportedProgram) -> tuple[private.Program, dict[str, bytes]]:
    edge = private.to_delegates({"forward": exported}, private.partitioner())
    return private.emitted(private.to_program(edge, CONFIG))


def check_same(*found: tuple[private.Program, dict[str, bytes]]) -> None:
    """To the byte, with the same constants."""
    ours, expected = (
        (bytes(private.serialize_pte_binary(private.PTEFile(program=program))), data)
        for program, data in found
    )
    assert ours == expected


class Calls(nn.Module):
    """Calls of operators of which passes change some."""

    def __init__(self, calls: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.calls(x, ids)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x, ids: torch.relu(x) + x,
    "a transposed matrix": lambda x, ids: x.t(),
    "a view": lambda x, ids: torch.relu(x).view(-1),
    "a number": lambda x, ids: x * 2.0,
    "a number that a tensor equals": lambda x, ids: x + 1,
    "a size": lambda x, ids: x * x.shape[0],
    "two types": lambda x, ids: x + ids,
    "a number in an operator that takes one": lambda x, ids: torch.clamp(x, min=1.0),
}


@pytest.mark.parametrize("calls", CALLS)
def test_a_pass_is_left_out_only_where_it_changes_nothing(calls: str) -> None:
    inputs = (torch.randn(4, 4), torch.ones(4, 4, dtype=torch.int64))
    rows = torch.export.Dim("rows", min=2, max=8)
    exported = torch.export.export(
        Calls(CALLS[calls]), inputs, dynamic_shapes=({0: rows}, {0: rows}), strict=False
    )
    graph = exported.graph_module
    for one in passes():
        before = written(graph)
        changes = private.changes_operators(one, graph)
        assert written(graph) == before, "it only looks"
        graph = one(graph).graph_module
        assert changes == (written(graph) != before)


def passes() -> list[private.ExportPass]:
    """Those of operators, in their order."""
    before, _ = _get_aten_to_edge_passes(private.EDGE_CONFIG)
    inner = [getattr(one, "__wrapped__", one) for one in before]
    return [one for one in inner if isinstance(one, private._OF_OPERATORS)]


def written(module: torch.fx.GraphModule) -> list[str]:
    """The calls of a graph. A call's number stands for what it gives."""
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    return [
        f"{node.target}{torch.fx.map_arg((node.args, node.kwargs), lambda given: f'%{numbers[given]}')}"
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def test_each_of_these_passes_does_nothing_else() -> None:
    assert {type(one) for one in passes()} == set(private._OF_OPERATORS)
    own = {name for one in private._OF_OPERATORS for name in vars(one) if not name.startswith("__")}
    assert own <= {"call_operator", "call", "_abc_impl"}, (
        "whether they call other operators is all that is asked"
    )


def test_it_is_the_installed_version() -> None:
    assert version("executorch").startswith("1.5.")


def test_nothing_else_imports_private_parts() -> None:
    """`executorch.exir` itself is public."""
    sources = Path(bedplate.__file__).parent
    found = {
        (file.name, node.module)
        for file in sources.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("executorch.")
    }
    elsewhere = {module for file, module in found if file != Path(private.__file__).name}
    assert elsewhere == {"executorch.exir"}


def test_the_graph_of_a_delegate(
    lowered: tuple[private.Program, dict[str, bytes]], graphs: list[private.XNNGraph]
) -> None:
    (graph,) = graphs
    assert isinstance(graph, private.XNNGraph)
    assert all(isinstance(node, private.XNode) for node in graph.xnodes)
    operators = [node.xnode_union for node in graph.xnodes]
    kinds = (
        private.XNNAdd,
        private.XNNConvert,
        private.XNNMultiply,
        private.XNNStaticReshape,
        private.XNNStaticSlice,
    )
    assert all(any(isinstance(one, kind) for one in operators) for kind in kinds)
    linears = [one for one in operators if isinstance(one, private.XNNFullyConnected)]
    assert len(linears) == 3  # the weight-only one is there, so it did not fall out
    assert {one.bias_id for one in linears} == {private.XNN_INVALID_VALUE_ID}
    params = [getattr(value.xvalue_union, "quant_params", None) for value in graph.xvalues]
    assert any(isinstance(one, private.PerChannelGroupQuant) for one in params)
    constants = graph.constant_data
    assert all(isinstance(one, private.ConstantDataOffset) for one in constants)
    assert {one.offset for one in constants[1:]} == {private.UINT64_MAX}
    _, data = lowered
    assert {one.named_key for one in constants[1:]} == data.keys()


def test_a_program_is_written_and_read(lowered: tuple[private.Program, dict[str, bytes]]) -> None:
    program, _ = lowered
    data = bytes(private.serialize_pte_binary(private.PTEFile(program=program)))
    again = bytes(private.serialize_pte_binary(private.deserialize_pte_binary(data)))
    assert again == data


def test_a_program_with_its_constants_inside_runs(
    module: Everything, lowered: tuple[private.Program, dict[str, bytes]], tmp_path: Path
) -> None:
    """By the schema's classes: its own method, and one that is made by hand."""
    program, data = lowered
    program.execution_plan[0].values.append(private.EValue(private.Null()))
    program.execution_plan += metadata_methods({"number": 7, "numbers": [1, 2], "is_so": True})
    bare = bytes(private.serialize_pte_binary(private.PTEFile(program=program)))
    inside = {key: _constant(key, np.frombuffer(value, np.uint8), "bytes") for key, value in data.items()}
    for part in ("codes", "scales"):
        value = getattr(module.embedding, part).numpy().view(np.uint8).ravel()
        inside[f"embedding.{part}"] = _constant(part, value, TENSOR)
    (tmp_path / "all.pte").write_bytes(embed(bare, inside))
    loaded = StockProgram(tmp_path / "all.pte")
    expected = module(TOKENS)
    got = loaded.run("forward", TOKENS)
    assert (got - expected).abs().max() < 1e-2 * expected.abs().max()
    assert loaded.constant("number") == [7]
    assert loaded.constant("numbers") == [1, 2]
    assert loaded.constant("is_so") == [True]


def _constant(name: str, data: np.ndarray, layout: str) -> Constant:
    return Constant.of(name, "uint8", data.shape, layout, data)
