"""A delegate's graph, made leaner before it is written: what ExecuTorch's lowering computes twice is computed once.

At one token a call an operator costs as much in dispatch as in arithmetic, and the lowering quantizes the input of
each linear anew, though q, k and v, or gate and up, take the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bedplate.compile.graph_editor import tensor_of
from bedplate.compile.join_heads import join_heads
from bedplate.compile.join_linears import join_linears
from bedplate.executorch_1_5 import XNNConvert, XNNFullyConnected, XNNGraph, delegate_graphs


@contextmanager
def lean_delegates(symbol_of: Mapping[str, str]) -> Iterator[set[str]]:
    """Within this context, XNNPACK's preprocessing writes lean graphs; gives the symbols of joined constants.

    symbol_of: see `join_linears`.
    """
    joined: set[str] = set()

    def make_lean(graph: XNNGraph) -> None:
        share_conversions(graph)
        joined.update(join_linears(graph, symbol_of))
        join_heads(graph)

    with delegate_graphs(make_lean):
        yield joined


def share_conversions(graph: XNNGraph) -> None:
    """Of several conversions of one value for linears of one weight type keep the first.

    Results stay the same to the bit. Weight types count, for where XNNPACK has KleidiAI's kernels, it lays a
    converted value out as the linears that take it want it.
    """
    values = {tensor_of(value).id_out: value for value in graph.xvalues}
    kept: dict[str, int] = {}
    replaced: dict[int, int] = {}
    for node in graph.xnodes:
        convert = node.xnode_union
        if isinstance(convert, XNNConvert):
            weights = _weight_types(graph, values, convert.output_id)
            what = repr((convert.input_id, convert.flags, weights, _anonymous(values[convert.output_id])))
            first = kept.setdefault(what, convert.output_id)
            if first != convert.output_id:
                replaced[convert.output_id] = first
    graph.xnodes[:] = [node for node in graph.xnodes if not _makes(node.xnode_union, replaced)]
    graph.xvalues[:] = [value for index, value in values.items() if index not in replaced]
    for node in graph.xnodes:
        if isinstance(node.xnode_union, XNNFullyConnected):
            taken = node.xnode_union.input1_id
            node.xnode_union.input1_id = replaced.get(taken, taken)


def _weight_types(graph: XNNGraph, values: Mapping[int, Any], converted: int) -> set[int]:
    linears = (node.xnode_union for node in graph.xnodes if isinstance(node.xnode_union, XNNFullyConnected))
    return {int(tensor_of(values[one.filter_id]).datatype) for one in linears if one.input1_id == converted}


def _makes(operator: Any, outputs: Mapping[int, int]) -> bool:
    return isinstance(operator, XNNConvert) and operator.output_id in outputs


def _anonymous(value: Any) -> Any:
    """The value less its number."""
    value = copy.deepcopy(value)
    tensor_of(value).id_out = None
    return value
