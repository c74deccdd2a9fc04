"""A delegate's graph with fewer operators: linears of one input become one, and so do the branches beside them.

At one token a call, each product that two threads share costs a hand-over, as long as a small product itself. So
q, k and v of one input are computed as one, and slices take their parts; what is then done to every slice alike is
done before the slicing:

    linear(x, Wq), linear(x, Wk)             → slices of linear(x, [Wq; Wk])
    linear(slice a, Bq), linear(slice a, Bk) → slices of linear(a, [Bq 0; 0 Bk])
    add(slice y, slice z), …                 → slices of add(y, z)

Each output stays the same sum of the same products: more of them are computed by one operator.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from bedplate.compile.graph_editor import GraphEditor, Slice, quant_params, slice_node, tensor_of
from bedplate.compile.units import placeholder
from bedplate.executorch_1_5 import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    ConstantDataOffset,
    PerChannelGroupQuant,
    XNNAdd,
    XNNFullyConnected,
    XNNGraph,
    XNode,
)
from bedplate.names import DIAGONAL, ROWS, Way, joined_name, kin


def join_linears(graph: XNNGraph, symbol_of: Mapping[str, str]) -> set[str]:
    """Join what can be joined, in place; return the symbols of the constants that the graph now wants instead.

    symbol_of: symbols by ExecuTorch's keys, less a leading `scale_`. A joined constant goes by its placeholder.
    """
    joiner = _Joiner(graph, symbol_of)
    while joiner.join_one_input() or joiner.join_slices() or joiner.join_sums():
        joiner.forget_unused()
    return joiner.symbols


class _Joiner:
    def __init__(self, graph: XNNGraph, symbol_of: Mapping[str, str]) -> None:
        self._editor, self._graph, self._symbol_of = GraphEditor(graph), graph, symbol_of
        self._slices: dict[int, Slice] = {}
        self.symbols: set[str] = set()

    def join_one_input(self) -> bool:
        """Linears of one input whose weights are kin."""
        alike: dict[Hashable, list[XNode]] = {}
        for node in self._linears():
            linear = node.xnode_union
            alike.setdefault((linear.input1_id, self._kind(linear)), []).append(node)
        return any(self._join(nodes, ROWS, nodes[0].xnode_union.input1_id) for nodes in alike.values())

    def join_slices(self) -> bool:
        """Linears whose inputs are all the slices of one value, each a linear's."""
        alike: dict[tuple[int, Hashable], list[XNode]] = {}
        for node in self._linears():
            linear = node.xnode_union
            taken = self._slices.get(linear.input1_id)
            if (
                taken is not None
                and not self._has_groups(linear)
                and self._editor.uses(linear.input1_id) == 1
            ):
                alike.setdefault((taken.of, self._kind(linear)), []).append(node)
        return any(
            self._join(nodes, DIAGONAL, of)
            for (of, _), nodes in alike.items()
            if self._covered(of, [node.xnode_union.input1_id for node in nodes])
        )

    def join_sums(self) -> bool:
        """Sums of all the slices of one value with all the slices of another."""
        alike: dict[tuple[int, int], list[XNode]] = {}
        for node in self._editor.operators(XNNAdd):
            add = node.xnode_union
            one, two = (self._slices.get(index) for index in (add.input1_id, add.input2_id))
            if one and two and (one.start, one.width) == (two.start, two.width):
                alike.setdefault((one.of, two.of), []).append(node)
        return any(self._join_sums(nodes, one, two) for (one, two), nodes in alike.items())

    def forget_unused(self) -> None:
        used = self._editor.drop_unused()
        self._slices = {index: taken for index, taken in self._slices.items() if index in used}

    def _linears(self) -> Iterator[XNode]:
        return self._editor.operators(XNNFullyConnected)

    def _kind(self, linear: Any) -> Hashable:
        """What linears must have in common to become one."""
        weight = self._editor.value(linear.filter_id)
        params = quant_params(weight)
        name = self._symbol(tensor_of(weight).constant_buffer_idx)
        return (
            None if name is None else kin(name),
            int(tensor_of(weight).datatype),
            type(params),
            getattr(params, "group_size", None),
            linear.bias_id == XNN_INVALID_VALUE_ID,
            linear.flags,
        )

    def _has_groups(self, linear: Any) -> bool:
        return isinstance(quant_params(self._editor.value(linear.filter_id)), PerChannelGroupQuant)

    def _join(self, nodes: Sequence[XNode], way: Way, input_id: int) -> bool:
        linears = [node.xnode_union for node in nodes]
        if len(nodes) < 2 or self._kind(linears[0])[0] is None:  # type: ignore[index]
            return False
        joined = copy.deepcopy(nodes[0])
        linear = joined.xnode_union
        linear.input1_id = input_id
        linear.filter_id = self._join_constants([one.filter_id for one in linears], way)
        if linear.bias_id != XNN_INVALID_VALUE_ID:
            linear.bias_id = self._join_constants([one.bias_id for one in linears], way)
        self._put_slices(nodes, joined)
        return True

    def _join_sums(self, nodes: Sequence[XNode], one: int, two: int) -> bool:
        inputs = [(node.xnode_union.input1_id, node.xnode_union.input2_id) for node in nodes]
        used_once = all(self._editor.uses(index) == 1 for pair in inputs for index in pair)
        first, second = zip(*inputs, strict=True)
        if not used_once or not self._covered(one, first) or not self._covered(two, second):
            return False
        joined = copy.deepcopy(nodes[0])
        joined.xnode_union.input1_id, joined.xnode_union.input2_id = one, two
        self._put_slices(nodes, joined)
        return True

    def _put_slices(self, nodes: Sequence[XNode], joined: XNode) -> None:
        """Replace the nodes by the joined one, where the first of them is, and slices of what it gives."""
        outputs = [node.xnode_union.output_id for node in nodes]
        widths = [self._editor.dims(index)[-1] for index in outputs]
        whole = self._editor.copy_value(outputs[0])
        dims = tensor_of(whole).dims
        dims[-1] = sum(widths)
        of = joined.xnode_union.output_id = tensor_of(whole).id_out
        placed, start = [joined], 0
        for node, output, width in zip(nodes, outputs, widths, strict=True):
            taken = self._slices[output] = Slice(of=of, start=start, width=width)
            placed.append(
                slice_node(taken, output, dims=len(dims), dim=len(dims) - 1, debug_handle=node.debug_handle)
            )
            start += width
        self._editor.replace(nodes, placed)

    def _join_constants(self, ids: Sequence[int], way: Way) -> int:
        whole = self._editor.copy_value(ids[0])
        tensors = [tensor_of(self._editor.value(index)) for index in ids]
        tensor = tensor_of(whole)
        tensor.dims[0] = sum(one.dims[0] for one in tensors)
        if way == DIAGONAL and tensor.num_dims == 2:
            tensor.dims[1] = sum(one.dims[1] for one in tensors)
        tensor.constant_buffer_idx = self._join_buffers([one.constant_buffer_idx for one in tensors], way)
        if (params := quant_params(whole)) is not None:
            every = [self._editor.value(index).xvalue_union.quant_params for index in ids]
            params.num_scales = sum(one.num_scales for one in every)
            params.scale_buffer_idx = self._join_buffers([one.scale_buffer_idx for one in every], way)
        return int(tensor.id_out)

    def _join_buffers(self, indices: Sequence[int], way: Way) -> int:
        symbols = [self._symbol(index) for index in indices]
        symbol = joined_name([symbol for symbol in symbols if symbol is not None], way)
        self.symbols.add(symbol)
        size = sum(self._graph.constant_data[index].size for index in indices)
        self._graph.constant_data.append(ConstantDataOffset(UINT64_MAX, size, placeholder(symbol)))
        return len(self._graph.constant_data) - 1

    def _symbol(self, buffer: int) -> str | None:
        return self._symbol_of.get(self._graph.constant_data[buffer].named_key.removeprefix("scale_"))

    def _covered(self, of: int, ids: Sequence[int]) -> bool:
        return self._editor.covered(of, [self._slices[index] for index in ids], -1)
