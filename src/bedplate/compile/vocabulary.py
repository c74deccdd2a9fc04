"""Few rows of the vocabulary while a structure is lowered. They are all alike, and of a small model they are most.

The lowering holds several copies of each weight, so embedding and head of real size would take gigabytes. No other
dimension of the program is as large as the number of the few rows. Where it stands, the real number takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bedplate.compile.graph_editor import quant_params, tensor_of
from bedplate.compile.units import Structure
from bedplate.executorch_1_5 import XNNGraph, delegate_graphs


@dataclass(frozen=True, kw_only=True)
class FewRows:
    """structure: with a vocabulary of `few` tokens. all: of how many the program is for."""

    structure: Structure
    few: int
    all: int

    @contextmanager
    def in_delegates(self) -> Iterator[None]:
        """In this context, the delegates that XNNPACK's preprocessing writes are for the whole vocabulary."""
        with delegate_graphs(self._widen_graph):
            yield

    def widen_program(self, program: Any) -> None:
        """In place; an `executorch.exir.schema.Program`."""
        for plan in program.execution_plan:
            for value in plan.values:
                if hasattr(value.val, "sizes"):
                    value.val.sizes = self._widened(value.val.sizes)

    def _widen_graph(self, graph: XNNGraph) -> None:
        held: set[int] = set()
        for value in graph.xvalues:
            tensor, params = tensor_of(value), quant_params(value)
            if self.few not in tensor.dims:
                continue
            tensor.dims = self._widened(tensor.dims)
            held.add(tensor.constant_buffer_idx)
            if params is not None:
                params.num_scales = params.num_scales // self.few * self.all
                held.add(params.scale_buffer_idx)
        for index in held - {0}:  # the first stands for: no constant
            constant = graph.constant_data[index]
            constant.size = constant.size // self.few * self.all

    def _widened(self, dims: list[int]) -> list[int]:
        return [self.all if dim == self.few else dim for dim in dims]


def few_rows(structure: Structure) -> FewRows:
    """The structure to lower in place of this one. If its vocabulary is small, it is the same."""
    spec = structure.spec
    # More than any dimension is, though linears are joined.
    others = (
        spec.dim,
        (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim,
        2 * spec.hidden_dim,
        structure.max_context,
        structure.max_chunk,
        *structure.ranks.values(),
        *structure.corrections.values(),
    )
    few = min(spec.vocab_size, sum(others) + 1)
    return FewRows(
        structure=replace(structure, spec=replace(spec, vocab_size=few)), few=few, all=spec.vocab_size
    )
