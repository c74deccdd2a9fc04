"""A delegate's graph with fewer operators: what is done to the heads of q and k alike is done to all of them at once.

After q, k and v have become one linear, rotary embedding still takes four operators for q and the same four for k.
They are as well done to both together, seen as heads side by side, which are taken apart at the end:

    reshape(slice q), reshape(slice k)            → slices of reshape(slice qk), along the heads
    op(slice q, cos), op(slice k, cos)             → slices of op(qk, cos)
    op(slice q, slice q'), op(slice k, slice k')   → slices of op(qk, qk')

And v is seen as heads beside them: reshape(slice qk), reshape(slice v) → slices of reshape(qkv), along the heads.

Every number is computed as before, so results stay the same to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from itertools import pairwise

from bedplate.compile.graph_editor import GraphEditor, Slice, inputs, slice_node, tensor_of
from bedplate.executorch_1_5 import (
    XNN_INVALID_VALUE_ID,
    XNNAdd,
    XNNFullyConnected,
    XNNGraph,
    XNNMultiply,
    XNNStaticReshape,
    XNNStaticSlice,
    XNode,
)

_DIMS, _HEADS = 4, 2  # [1, S, heads, head_dim]
_ALIKE = (
    XNNMultiply,
    XNNFullyConnected,
    XNNAdd,
)  # what treats each head on its own, if it takes one number a head


def join_heads(graph: XNNGraph) -> None:
    """Join what can be joined, in place."""
    joiner = _Joiner(graph)
    if joiner.join_reshapes():
        while joiner.join_operators():
            pass
        joiner.take_apart()
    joiner.reshape_before_slicing()


class _Joiner:
    def __init__(self, graph: XNNGraph) -> None:
        self._graph, self._editor = graph, GraphEditor(graph)
        self._slices: dict[int, Slice] = {}  # along the heads; not yet operators of the graph

    def join_reshapes(self) -> bool:
        """Reshapes to heads of adjacent slices that operators use alike."""
        alike: dict[Hashable, list[tuple[Slice, XNode]]] = {}
        for node in self._editor.operators(XNNStaticReshape):
            reshape = node.xnode_union
            taken = self._slice_before(reshape.input_id)
            consumers = self._consumers(reshape.output_id)
            if taken is not None and reshape.num_dims == _DIMS and consumers:
                alike.setdefault((taken.of, reshape.new_shape[-1], consumers), []).append((taken, node))
        return any(self._join_reshapes(found) for found in alike.values())

    def _join_reshapes(self, found: Sequence[tuple[Slice, XNode]]) -> bool:
        slices, nodes = [taken for taken, _ in found], [node for _, node in found]
        adjacent = all(a.start + a.width == b.start for a, b in pairwise(slices))
        if len(nodes) < 2 or not adjacent:
            return False
        taken = Slice(of=slices[0].of, start=slices[0].start, width=sum(one.width for one in slices))
        part = self._editor.copy_value(nodes[0].xnode_union.input_id)
        dims = tensor_of(part).dims
        dims[-1] = taken.width
        joined = copy.deepcopy(nodes[0])
        reshape = joined.xnode_union
        reshape.input_id = tensor_of(part).id_out
        reshape.new_shape = list(reshape.new_shape)
        reshape.new_shape[_HEADS] = sum(node.xnode_union.new_shape[_HEADS] for node in nodes)
        handle = nodes[0].debug_handle
        before = slice_node(taken, reshape.input_id, dims=len(dims), dim=len(dims) - 1, debug_handle=handle)
        self._put(nodes, [before, joined])
        return True

    def join_operators(self) -> bool:
        """Operators of one kind on all the slices of one value, whatever else they take being the same."""
        alike: dict[Hashable, list[XNode]] = {}
        for node in self._graph.xnodes:
            if isinstance(node.xnode_union, _ALIKE) and self._treats_heads_alike(node):
                alike.setdefault(self._kind(node), []).append(node)
        return any(self._join_operators(nodes) for nodes in alike.values())

    def _treats_heads_alike(self, node: XNode) -> bool:
        others = [index for _, index in inputs(node.xnode_union) if index not in self._slices]
        if len(others) == len(list(inputs(node.xnode_union))):
            return False
        if isinstance(node.xnode_union, XNNFullyConnected):
            return True  # along the last dimension
        shapes = [self._editor.dims(index) for index in others]
        return all(len(shape) == _DIMS and shape[_HEADS] == 1 for shape in shapes)

    def _kind(self, node: XNode) -> Hashable:
        operator = node.xnode_union
        named = tuple(
            (field, self._slices[index].of if index in self._slices else self._what(index))
            for field, index in inputs(operator)
        )
        return type(operator), operator.flags, repr(node.output_min_max), named

    def _join_operators(self, nodes: Sequence[XNode]) -> bool:
        joined = copy.deepcopy(nodes[0])
        for field, index in inputs(nodes[0].xnode_union):
            if index in self._slices:
                slices = [self._slices[getattr(node.xnode_union, field)] for node in nodes]
                if not self._editor.covered(slices[0].of, slices, _HEADS):
                    return False
                setattr(joined.xnode_union, field, slices[0].of)
        self._put(nodes, [joined])
        return True

    def take_apart(self) -> None:
        """Make the slices that are still used operators, each after what it is a slice of."""
        for index, taken in self._slices.items():
            if self._editor.uses(index):
                steps = self._graph.xnodes
                at = next(i for i, step in enumerate(steps) if step.xnode_union.output_id == taken.of)
                handle = steps[at].debug_handle
                steps.insert(at + 1, slice_node(taken, index, dims=_DIMS, dim=_HEADS, debug_handle=handle))
        self._editor.drop_unused()

    def reshape_before_slicing(self) -> None:
        """See all of a value as heads where each of its slices is only used so."""
        by_value: dict[tuple[int, int], list[tuple[Slice, XNode]]] = {}
        for node in self._editor.operators(XNNStaticReshape):
            reshape = node.xnode_union
            taken = self._slice_before(reshape.input_id)
            if taken is not None and reshape.num_dims == _DIMS and self._editor.uses(reshape.input_id) == 1:
                by_value.setdefault((taken.of, reshape.new_shape[-1]), []).append((taken, node))
        for (of, _), found in by_value.items():
            found.sort(key=lambda one: one[0].start)
            if len(found) > 1 and self._editor.covered(of, [taken for taken, _ in found], -1):
                self._reshape_before_slicing(of, [node for _, node in found])

    def _reshape_before_slicing(self, of: int, nodes: Sequence[XNode]) -> None:
        first = copy.deepcopy(nodes[0])
        reshape, handle = first.xnode_union, first.debug_handle
        whole = tensor_of(self._editor.copy_value(reshape.output_id))
        heads = [node.xnode_union.new_shape[_HEADS] for node in nodes]
        whole.dims[_HEADS] = sum(heads)
        reshape.input_id, reshape.output_id = of, whole.id_out
        reshape.new_shape = [*reshape.new_shape[:_HEADS], sum(heads), *reshape.new_shape[_HEADS + 1 :]]
        placed, start = [first], 0
        for node, width in zip(nodes, heads, strict=True):
            taken = Slice(of=whole.id_out, start=start, width=width)
            output = node.xnode_union.output_id
            placed.append(slice_node(taken, output, dims=_DIMS, dim=_HEADS, debug_handle=handle))
            start += width
        read = {node.xnode_union.input_id for node in nodes}
        gone = [
            step
            for step in self._graph.xnodes
            if step.xnode_union.output_id in read or any(step is n for n in nodes)
        ]
        self._editor.replace(gone, placed)
        self._editor.drop_unused()

    def _put(self, nodes: Sequence[XNode], placed: Sequence[XNode]) -> None:
        """Replace operators by others, the last of which gives what they gave, side by side."""
        outputs = [node.xnode_union.output_id for node in nodes]
        whole = tensor_of(self._editor.copy_value(outputs[0]))
        start = 0
        for output in outputs:
            width = self._editor.dims(output)[_HEADS]
            self._slices[output] = Slice(of=whole.id_out, start=start, width=width)
            start += width
        whole.dims[_HEADS] = start
        placed[-1].xnode_union.output_id = whole.id_out
        self._editor.replace(nodes, placed)

    def _slice_before(self, index: int) -> Slice | None:
        """What an operator takes of the last dimension to give this value."""
        for node in self._editor.operators(XNNStaticSlice):
            operator = node.xnode_union
            if operator.output_id == index and not any(operator.offsets[:-1]):
                return Slice(of=operator.input_id, start=operator.offsets[-1], width=operator.sizes[-1])
        return None

    def _consumers(self, index: int) -> frozenset[Hashable]:
        """What is done to a value: kinds of operators and what else they take."""
        found: set[Hashable] = set()
        for node in self._graph.xnodes:
            taken = list(inputs(node.xnode_union))
            if any(one == index for _, one in taken):
                others = tuple((field, None if one == index else self._what(one)) for field, one in taken)
                found.add((type(node.xnode_union), others))
        return frozenset(found)

    def _what(self, index: int) -> Hashable:
        """The same for two values that hold one constant."""
        if index == XNN_INVALID_VALUE_ID:
            return None
        tensor = tensor_of(self._editor.value(index))
        constant = self._graph.constant_data[tensor.constant_buffer_idx].named_key
        return (constant, tuple(tensor.dims)) if tensor.constant_buffer_idx > 0 else index
