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
from dataclasses import dataclass, fields
from typing import Any

from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    PerChannelGroupQuant,
    XNNAdd,
    XNNFullyConnected,
    XNNGraph,
    XNNStaticSlice,
    XNode,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import UINT64_MAX, XNN_INVALID_VALUE_ID

from bedplate.compile.units import placeholder
from bedplate.quantize.joined import DIAGONAL, ROWS, Way, joined_name, kin


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """Columns of a value: those from `start` on."""

    of: int
    start: int
    width: int


def join_linears(graph: XNNGraph, symbol_of: Mapping[str, str]) -> set[str]:
    """Join what can be joined, in place; return the symbols of the constants that the graph now wants instead.

    symbol_of: symbols by ExecuTorch's keys, less a leading `scale_`. A joined constant goes by its placeholder.
    """
    joiner = _Joiner(graph, symbol_of)
    while joiner.join_one_input() or joiner.join_slices() or joiner.join_sums():
        joiner.drop_unused()
    return joiner.symbols


class _Joiner:
    def __init__(self, graph: XNNGraph, symbol_of: Mapping[str, str]) -> None:
        self._graph, self._symbol_of = graph, symbol_of
        self._slices: dict[int, _Slice] = {}
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
            if taken is not None and not self._has_groups(linear) and self._uses(linear.input1_id) == 1:
                alike.setdefault((taken.of, self._kind(linear)), []).append(node)
        return any(
            self._join(nodes, DIAGONAL, of)
            for (of, _), nodes in alike.items()
            if self._covered(of, [node.xnode_union.input1_id for node in nodes])
        )

    def join_sums(self) -> bool:
        """Sums of all the slices of one value with all the slices of another."""
        alike: dict[tuple[int, int], list[XNode]] = {}
        for node in self._graph.xnodes:
            add = node.xnode_union
            if not isinstance(add, XNNAdd):
                continue
            one, two = (self._slices.get(index) for index in (add.input1_id, add.input2_id))
            if one and two and (one.start, one.width) == (two.start, two.width):
                alike.setdefault((one.of, two.of), []).append(node)
        return any(self._join_sums(nodes, one, two) for (one, two), nodes in alike.items())

    def drop_unused(self) -> None:
        """Take away the slices, values and constants that nothing refers to any more."""
        graph = self._graph
        graph.xnodes[:] = [
            node
            for node in graph.xnodes
            if not isinstance(node.xnode_union, XNNStaticSlice)
            or self._uses(node.xnode_union.output_id)
            or node.xnode_union.output_id in graph.output_ids
        ]
        used = {index for node in graph.xnodes for _, index in _ids(node.xnode_union)}
        used |= {*graph.input_ids, *graph.output_ids}
        graph.xvalues[:] = [value for value in graph.xvalues if tensor_of(value).id_out in used]
        self._slices = {index: taken for index, taken in self._slices.items() if index in used}
        self._compact_constants()

    def _compact_constants(self) -> None:
        graph = self._graph
        kept: dict[int, int] = {0: 0}  # the first stands for: no constant
        for value in graph.xvalues:
            tensor, params = tensor_of(value), _quant_params(value)
            tensor.constant_buffer_idx = kept.setdefault(tensor.constant_buffer_idx, len(kept))
            if params is not None and getattr(params, "scale_buffer_idx", -1) > 0:
                params.scale_buffer_idx = kept.setdefault(params.scale_buffer_idx, len(kept))
        graph.constant_data[:] = [graph.constant_data[index] for index in kept]

    def _linears(self) -> Iterator[XNode]:
        return (node for node in self._graph.xnodes if isinstance(node.xnode_union, XNNFullyConnected))

    def _kind(self, linear: Any) -> Hashable:
        """What linears must have in common to become one."""
        weight = self._value(linear.filter_id)
        params = _quant_params(weight)
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
        return isinstance(_quant_params(self._value(linear.filter_id)), PerChannelGroupQuant)

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
        used_once = all(self._uses(index) == 1 for pair in inputs for index in pair)
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
        widths = [tensor_of(self._value(index)).dims[-1] for index in outputs]
        whole = self._copy_value(outputs[0])
        tensor_of(whole).dims[-1] = sum(widths)
        of = joined.xnode_union.output_id = tensor_of(whole).id_out
        placed, start = [joined], 0
        for node, output, width in zip(nodes, outputs, widths, strict=True):
            taken = self._slices[output] = _Slice(of=of, start=start, width=width)
            placed.append(XNode(_slice_node(taken, output, len(tensor_of(whole).dims)), node.debug_handle))
            start += width
        steps = self._graph.xnodes
        at = next(i for i, step in enumerate(steps) if step is nodes[0])
        rest = [step for step in steps[at:] if not any(step is node for node in nodes)]
        steps[at:] = [*placed, *rest]

    def _join_constants(self, ids: Sequence[int], way: Way) -> int:
        whole = self._copy_value(ids[0])
        tensors = [tensor_of(self._value(index)) for index in ids]
        tensor = tensor_of(whole)
        tensor.dims[0] = sum(one.dims[0] for one in tensors)
        if way == DIAGONAL and tensor.num_dims == 2:
            tensor.dims[1] = sum(one.dims[1] for one in tensors)
        tensor.constant_buffer_idx = self._join_buffers([one.constant_buffer_idx for one in tensors], way)
        if (params := _quant_params(whole)) is not None:
            every = [self._value(index).xvalue_union.quant_params for index in ids]
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

    def _copy_value(self, index: int) -> Any:
        """A new value like this one, inside of the graph."""
        value = copy.deepcopy(self._value(index))
        tensor = tensor_of(value)
        tensor.id_out = max(tensor_of(one).id_out for one in self._graph.xvalues) + 1
        tensor.external_id, tensor.flags = XNN_INVALID_VALUE_ID, 0
        self._graph.xvalues.append(value)
        return value

    def _symbol(self, buffer: int) -> str | None:
        return self._symbol_of.get(self._graph.constant_data[buffer].named_key.removeprefix("scale_"))

    def _value(self, index: int) -> Any:
        return next(value for value in self._graph.xvalues if tensor_of(value).id_out == index)

    def _uses(self, index: int) -> int:
        nodes = (node.xnode_union for node in self._graph.xnodes)
        taken = sum(i == index and not name.startswith("output") for node in nodes for name, i in _ids(node))
        return taken + (index in self._graph.output_ids)

    def _covered(self, of: int, ids: Sequence[int]) -> bool:
        """Whether the values are all the slices of one, in order."""
        width, end = tensor_of(self._value(of)).dims[-1], 0
        for taken in (self._slices[index] for index in ids):
            if taken.start != end:
                return False
            end += taken.width
        return bool(end == width)


def tensor_of(value: Any) -> Any:
    """The XNNTensorValue of an XValue, quantized or not."""
    return getattr(value.xvalue_union, "tensor_value", value.xvalue_union)


def _quant_params(value: Any) -> Any:
    """The quantization parameters of an XValue; None: it holds floats."""
    return getattr(value.xvalue_union, "quant_params", None)


def _ids(operator: Any) -> Iterator[tuple[str, int]]:
    for field in fields(operator):
        if field.name.endswith("_id"):
            yield field.name, getattr(operator, field.name)


def _slice_node(taken: _Slice, output: int, dims: int) -> XNNStaticSlice:
    before = [0] * (dims - 1)  # from their start; a size of 0: to their end, whatever that is in this call
    return XNNStaticSlice(
        num_dims=dims,
        offsets=[*before, taken.start],
        sizes=[*before, taken.width],
        input_id=taken.of,
        output_id=output,
        flags=0,
    )
