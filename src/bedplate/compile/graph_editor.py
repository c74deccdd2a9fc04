"""Changing a delegate's graph before it is written: its values, who uses them, and operators in another's place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bedplate.executorch_1_5 import XNN_INVALID_VALUE_ID, XNNGraph, XNNStaticSlice, XNode


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part of a value along one of its dimensions: what lies from `start` on."""

    of: int
    start: int
    width: int


class GraphEditor:
    """Values go by their numbers. An operator is an XNode; what it does, its `xnode_union`."""

    def __init__(self, graph: XNNGraph) -> None:
        self.graph = graph

    def operators(self, kind: type) -> Iterator[XNode]:
        return (node for node in self.graph.xnodes if isinstance(node.xnode_union, kind))

    def value(self, index: int) -> Any:
        return next(value for value in self.graph.xvalues if tensor_of(value).id_out == index)

    def dims(self, index: int) -> list[int]:
        return list(tensor_of(self.value(index)).dims)

    def copy_value(self, index: int) -> Any:
        """A new value like this one, inside of the graph."""
        value = copy.deepcopy(self.value(index))
        tensor = tensor_of(value)
        tensor.id_out = max(tensor_of(one).id_out for one in self.graph.xvalues) + 1
        tensor.external_id, tensor.flags = XNN_INVALID_VALUE_ID, 0
        self.graph.xvalues.append(value)
        return value

    def uses(self, index: int) -> int:
        operators = (node.xnode_union for node in self.graph.xnodes)
        taken = sum(found == index for operator in operators for _, found in inputs(operator))
        return taken + (index in self.graph.output_ids)

    def covered(self, of: int, slices: Sequence[Slice], dim: int) -> bool:
        """Whether these are all of a value along a dimension, in order."""
        end = 0
        for taken in slices:
            if (taken.of, taken.start) != (of, end):
                return False
            end += taken.width
        return end == self.dims(of)[dim]

    def replace(self, nodes: Sequence[XNode], placed: Sequence[XNode]) -> None:
        """Put operators where the first of others is, and take those away."""
        steps = self.graph.xnodes
        at = next(i for i, step in enumerate(steps) if step is nodes[0])
        rest = [step for step in steps[at:] if not any(step is node for node in nodes)]
        steps[at:] = [*placed, *rest]

    def drop_unused(self) -> set[int]:
        """Take away the slices, values and constants that nothing refers to any more; the values that are left."""
        graph = self.graph
        graph.xnodes[:] = [
            node
            for node in graph.xnodes
            if not isinstance(node.xnode_union, XNNStaticSlice) or self.uses(node.xnode_union.output_id)
        ]
        used = {index for node in graph.xnodes for _, index in _ids(node.xnode_union)}
        used |= {*graph.input_ids, *graph.output_ids}
        graph.xvalues[:] = [value for value in graph.xvalues if tensor_of(value).id_out in used]
        self._compact_constants()
        return used

    def _compact_constants(self) -> None:
        graph = self.graph
        kept: dict[int, int] = {0: 0}  # the first stands for: no constant
        for value in graph.xvalues:
            tensor, params = tensor_of(value), quant_params(value)
            tensor.constant_buffer_idx = kept.setdefault(tensor.constant_buffer_idx, len(kept))
            if params is not None and getattr(params, "scale_buffer_idx", -1) > 0:
                params.scale_buffer_idx = kept.setdefault(params.scale_buffer_idx, len(kept))
        graph.constant_data[:] = [graph.constant_data[index] for index in kept]


def tensor_of(value: Any) -> Any:
    """The XNNTensorValue of an XValue, quantized or not."""
    return getattr(value.xvalue_union, "tensor_value", value.xvalue_union)


def quant_params(value: Any) -> Any:
    """The quantization parameters of an XValue; None: it holds floats."""
    return getattr(value.xvalue_union, "quant_params", None)


def inputs(operator: Any) -> Iterator[tuple[str, int]]:
    """The fields that name what an operator reads, and the values."""
    return ((field, index) for field, index in _ids(operator) if not field.startswith("output"))


def _ids(operator: Any) -> Iterator[tuple[str, int]]:
    for field in fields(operator):
        if field.name.endswith("_id"):
            yield field.name, getattr(operator, field.name)


def slice_node(taken: Slice, output: int, *, dims: int, dim: int, debug_handle: int) -> XNode:
    """The operator that takes a slice along `dim` of a value of `dims` dimensions."""
    offsets, sizes = [0] * dims, [0] * dims  # a size of 0: to the end, whatever that is in this call
    offsets[dim], sizes[dim] = taken.start, taken.width
    operator = XNNStaticSlice(
        num_dims=dims, offsets=offsets, sizes=sizes, input_id=taken.of, output_id=output, flags=0
    )
    return XNode(operator, debug_handle)
