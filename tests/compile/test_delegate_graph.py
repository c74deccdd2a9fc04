"""Delegates are written lean; that results stay the same to the bit, tests/link shows beside ExecuTorch's lowering."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNConvert, XNNGraph
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from stock import StockProgram
from torch import Tensor, nn

from bedplate.compile.delegate_graph import lean_delegates, share_conversions
from bedplate.executorch_1_5 import partitioner
from bedplate.quantize.modules import QuantizedLinear
from bedplate.quantize.recipe import EIGHT_BIT, Scheme
from bedplate.quantize.weights import quantize_weight


class Linears(nn.Module):
    """One input into two linears of 4 bits and one of 8, and the sum of their outputs into another."""

    def __init__(self) -> None:
        super().__init__()
        four, eight = Scheme(bits=4, group_size=32), EIGHT_BIT
        self.a, self.b, self.c, self.d = (
            QuantizedLinear(quantize_weight(torch.randn(64, 64), scheme))
            for scheme in (four, four, eight, eight)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x) + self.b(x) + self.c(x))  # type: ignore[no-any-return]


def lowered(module: nn.Module, path: Path) -> StockProgram:
    exported = torch.export.export(module, (torch.zeros(3, 64),), strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    edge.to_executorch().save(str(path))
    return StockProgram(path)


def conversions(graph: XNNGraph) -> int:
    return sum(isinstance(node.xnode_union, XNNConvert) for node in graph.xnodes)


def test_an_input_is_quantized_once_for_each_type_of_weight(tmp_path: Path, graphs: list[XNNGraph]) -> None:
    torch.manual_seed(0)
    module, x = Linears().eval(), torch.randn(3, 64)
    stock = lowered(module, tmp_path / "stock.pte").run("forward", x)
    with lean_delegates({}):
        lean = lowered(module, tmp_path / "lean.pte").run("forward", x)
    assert torch.equal(lean, stock)
    assert [conversions(graph) for graph in graphs] == [4, 3]
    assert len(graphs[1].xvalues) == len(graphs[0].xvalues) - 1


def test_a_lean_graph_stays_as_it_is(tmp_path: Path, graphs: list[XNNGraph]) -> None:
    with lean_delegates({}):
        lowered(Linears().eval(), tmp_path / "lean.pte")
    before = repr(graphs[0])
    share_conversions(graphs[0])
    assert repr(graphs[0]) == before


def test_the_patch_ends_with_its_context() -> None:
    serialize = xnnpack_preprocess.serialize_xnnpack_binary
    with pytest.raises(RuntimeError), lean_delegates({}):
        assert xnnpack_preprocess.serialize_xnnpack_binary is not serialize
        raise RuntimeError
    assert xnnpack_preprocess.serialize_xnnpack_binary is serialize
