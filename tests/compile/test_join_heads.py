"""Rotary embedding of q and k at once. That results stay the same to the bit, tests/link shows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNAdd,
    XNNGraph,
    XNNStaticReshape,
    XNNStaticSlice,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from small_spec import table
from torch import Tensor, nn
from torch.export import Dim

from bedplate.compile.delegate_graph import share_conversions
from bedplate.compile.graph_editor import inputs, tensor_of
from bedplate.compile.join_heads import join_heads
from bedplate.compile.join_linears import join_linears
from bedplate.compile.symbols import executorch_keys
from bedplate.executorch_1_5 import partitioner
from bedplate.model.parts import Rope
from bedplate.quantize.foundation import pack_quantized
from bedplate.quantize.modules import QuantizedLinear
from bedplate.quantize.recipe import Scheme
from bedplate.quantize.weights import quantize_weight

HEAD_DIM, DIM = 16, 64
HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}


class Projections(nn.Module):
    """q, k and v of one input, seen as heads; of those named in `turned`, after rotary embedding."""

    def __init__(self, turned: tuple[str, ...]) -> None:
        super().__init__()
        self.turned = turned
        self.rope = Rope([table(10000.0, HEAD_DIM)], HEAD_DIM, 32)
        self.names: dict[str, str] = {}
        constants = {}
        for name, heads in HEADS.items():
            weight = quantize_weight(torch.randn(heads * HEAD_DIM, DIM), Scheme(bits=4, group_size=32))
            packed = pack_quantized(f"layers.0.self_attn.{name}.weight", weight, is_embedding=False)
            constants |= {constant.name: constant for constant in packed}
            self.add_module(name, QuantizedLinear(weight, None))
        self.names = executorch_keys(constants)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        heads = {
            name: self.get_submodule(name)(x).view(1, -1, count, HEAD_DIM) for name, count in HEADS.items()
        }
        return tuple(
            self.rope(value, cos, sin) if name in self.turned else value for name, value in heads.items()
        )


@pytest.fixture
def joined(request: pytest.FixtureRequest, graphs: list[XNNGraph]) -> XNNGraph:
    torch.manual_seed(0)
    module = Projections(request.param).eval()
    length = Dim("length", min=1, max=16)
    example = (torch.zeros(1, 3, DIM), torch.zeros(1, 3, 1, HEAD_DIM), torch.zeros(1, 3, 1, HEAD_DIM))
    to_edge_transform_and_lower(
        torch.export.export(module, example, dynamic_shapes=({1: length},) * 3, strict=False),
        partitioner=[partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    (graph,) = graphs
    share_conversions(graph)
    join_linears(graph, module.names)
    join_heads(graph)
    return graph


def heads_taken(graph: XNNGraph, *, of: int) -> list[tuple[int, int]]:
    """First head and number of heads of each slice of a value, which it takes along the heads alone."""
    slices = [n.xnode_union for n in graph.xnodes if isinstance(n.xnode_union, XNNStaticSlice)]
    found = [one for one in slices if one.input_id == of]
    assert all(not any(one.offsets[:2] + one.offsets[3:] + one.sizes[:2] + one.sizes[3:]) for one in found)
    return sorted((one.offsets[2], one.sizes[2]) for one in found)


def operators(graph: XNNGraph) -> Counter[str]:
    return Counter(type(node.xnode_union).__name__.removeprefix("XNN") for node in graph.xnodes)


@pytest.mark.parametrize("joined", [("q_proj", "k_proj")], indirect=True)
def test_q_and_k_are_turned_at_once(joined: XNNGraph) -> None:
    found = operators(joined)
    assert (found["Multiply"], found["Add"], found["FullyConnected"]) == (2, 1, 2)
    reshapes = [n.xnode_union for n in joined.xnodes if isinstance(n.xnode_union, XNNStaticReshape)]
    assert [list(reshape.new_shape) for reshape in reshapes] == [[1, 0, 8, HEAD_DIM]]
    turned = next(n.xnode_union.output_id for n in joined.xnodes if isinstance(n.xnode_union, XNNAdd))
    assert heads_taken(joined, of=reshapes[0].output_id) == [(0, 6), (6, 2)]
    assert heads_taken(joined, of=turned) == [(0, 4), (4, 2)]
    assert found["StaticSlice"] == 4
    shapes = {
        tuple(tensor_of(value).dims)
        for value in joined.xvalues
        if tensor_of(value).id_out in joined.output_ids
    }
    assert shapes == {(1, 16, 4, HEAD_DIM), (1, 16, 2, HEAD_DIM)}


@pytest.mark.parametrize("joined", [("q_proj", "k_proj")], indirect=True)
def test_a_value_is_written_once_and_before_it_is_read(joined: XNNGraph) -> None:
    known = {tensor_of(value).id_out for value in joined.xvalues if tensor_of(value).constant_buffer_idx > 0}
    known |= set(joined.input_ids) | {0xFFFFFFFF}
    for node in joined.xnodes:
        for field, index in inputs(node.xnode_union):
            assert index in known, f"{field} of {node}"
        assert node.xnode_union.output_id not in known
        known.add(node.xnode_union.output_id)
    assert set(joined.output_ids) <= known


@pytest.mark.parametrize("joined", [("q_proj",), ("q_proj", "v_proj"), ()], indirect=True)
def test_what_is_not_side_by_side_or_used_otherwise_stays_apart(joined: XNNGraph) -> None:
    before = repr(joined)
    join_heads(joined)
    assert repr(joined) == before
    (reshape,) = (n.xnode_union for n in joined.xnodes if isinstance(n.xnode_union, XNNStaticReshape))
    assert heads_taken(joined, of=reshape.output_id) == [(0, 4), (4, 2), (6, 2)]
    assert operators(joined)["StaticSlice"] == 3
