"""Fewer operators in a delegate. That results stay the same to the bit, tests/link shows beside ExecuTorch's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn

from bedplate.compile.delegate_graph import share_conversions
from bedplate.compile.graph_editor import tensor_of
from bedplate.compile.join_linears import join_linears
from bedplate.compile.symbols import executorch_keys
from bedplate.compile.units import placeholder
from bedplate.executorch_1_5 import partitioner
from bedplate.model.lora import LoRALinear
from bedplate.quantize.foundation import pack_quantized
from bedplate.quantize.modules import QuantizedLinear
from bedplate.quantize.packing import pack_float
from bedplate.quantize.recipe import WEIGHT_ONLY, Scheme
from bedplate.quantize.weights import quantize_weight

FOUR_BIT = Scheme(bits=4, group_size=32)
WIDTHS = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


class Attention(nn.Module):
    """q, k and v of one input, and LoRA branches on some of them."""

    def __init__(self, branches: Mapping[str, int]) -> None:
        super().__init__()
        self.constants: dict[str, Any] = {}
        for name, width in WIDTHS.items():
            self.add_module(name, self._linear(name, 64, width, FOUR_BIT))
            if name in branches:
                branch = LoRALinear(64, width, rank=branches[name])
                branch.linear = self.get_submodule(name)
                branch.lora_a = self._linear(f"{name}.lora_a", 64, branches[name], WEIGHT_ONLY)
                branch.lora_b = self._linear(f"{name}.lora_b", branches[name], width, WEIGHT_ONLY)
                self.add_module(name, branch)

    def _linear(self, name: str, columns: int, rows: int, scheme: Scheme) -> QuantizedLinear:
        quantized = quantize_weight(torch.randn(rows, columns), scheme)
        bias = None if "lora" in name else torch.randn(rows)
        path = f"layers.0.self_attn.{name}"
        packed = pack_quantized(f"{path}.weight", quantized, is_embedding=False)
        if bias is not None:
            packed += pack_float(f"{path}.bias", bias.numpy(), is_tensor=False)
        self.constants |= {constant.name: constant for constant in packed}
        return QuantizedLinear(quantized, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.get_submodule(name)(x) for name in WIDTHS)


def graph_of(module: Attention, graphs: list[XNNGraph]) -> XNNGraph:
    exported = torch.export.export(module.eval(), (torch.zeros(1, 3, 64),), strict=False)
    to_edge_transform_and_lower(
        exported,
        partitioner=[partitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    (graph,) = graphs
    share_conversions(graph)
    return graph


def operators(graph: XNNGraph) -> Counter[str]:
    return Counter(type(node.xnode_union).__name__.removeprefix("XNN") for node in graph.xnodes)


@pytest.mark.parametrize(
    ("branches", "expected"),
    [
        ({}, {"FullyConnected": 1, "StaticSlice": 3}),
        ({"q_proj": 4, "k_proj": 4, "v_proj": 4}, {"FullyConnected": 3, "Add": 1, "StaticSlice": 3}),
        ({"q_proj": 4, "k_proj": 8, "v_proj": 2}, {"FullyConnected": 3, "Add": 1, "StaticSlice": 3}),
        ({"q_proj": 4, "v_proj": 4}, {"FullyConnected": 3, "Add": 2, "StaticSlice": 5}),
        ({"k_proj": 4}, {"FullyConnected": 3, "Add": 1, "StaticSlice": 3}),
    ],
    ids=["none", "all", "ranks differ", "two of three", "one of three"],
)
def test_linears_of_one_input_and_their_branches_are_one_each(
    branches: dict[str, int], expected: dict[str, int], graphs: list[XNNGraph]
) -> None:
    torch.manual_seed(0)
    module = Attention(branches)
    graph = graph_of(module, graphs)
    outputs = list(graph.output_ids)
    symbols = join_linears(graph, executorch_keys(module.constants))
    found = operators(graph)
    assert {name: found[name] for name in expected} == expected
    assert graph.output_ids == outputs
    # Each constant that is left is one that a value names, and a joined one goes by its placeholder.
    named = {constant.named_key for constant in graph.constant_data[1:]}
    assert {placeholder(symbol) for symbol in symbols} <= named
    assert "layers.0.self_attn.q_proj+k_proj+v_proj.weight#scales" in symbols
    assert ("layers.0.self_attn.q_proj&k_proj&v_proj.lora_b.weight#codes" in symbols) == (len(branches) == 3)
    ids = [tensor_of(value).id_out for value in graph.xvalues]
    assert len(ids) == len(set(ids))


def test_a_value_is_written_before_it_is_read(graphs: list[XNNGraph]) -> None:
    module = Attention(dict.fromkeys(WIDTHS, 4))
    graph = graph_of(module, graphs)
    join_linears(graph, executorch_keys(module.constants))
    constants = {
        tensor_of(value).id_out for value in graph.xvalues if tensor_of(value).constant_buffer_idx > 0
    }
    known = constants | set(graph.input_ids) | {0xFFFFFFFF}
    for node in graph.xnodes:
        for name, index in vars(node.xnode_union).items():
            if name.endswith("_id") and not name.startswith("output"):
                assert index in known, f"{name} of {node}"
        known.add(node.xnode_union.output_id)


def test_what_is_joined_stays_as_it_is(graphs: list[XNNGraph]) -> None:
    module = Attention({"q_proj": 4, "v_proj": 4})
    graph = graph_of(module, graphs)
    join_linears(graph, executorch_keys(module.constants))
    before = repr(graph)
    assert join_linears(graph, executorch_keys(module.constants)) == set()
    assert repr(graph) == before


def test_linears_that_are_no_kin_stay_apart(graphs: list[XNNGraph]) -> None:
    """By name alone: what belongs to an adapter must not be joined with what belongs to the foundation."""
    module = Attention({})
    names = {"q_proj": "mlp.gate_proj", "k_proj": "self_attn.k_proj.lora_a", "v_proj": "self_attn.v_proj"}
    renamed = {
        ".".join(["layers.0", names[name.split(".")[3]], name.split(".", 4)[4]]): constant
        for name, constant in module.constants.items()
    }
    graph = graph_of(module, graphs)
    before = repr(graph)
    assert join_linears(graph, executorch_keys(renamed)) == set()
    assert repr(graph) == before
