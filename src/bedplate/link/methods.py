"""The methods of a program, made from the one that was lowered.

The lowered method takes a third input whose length says how many of the last positions go to the head. `forward`
fixes it to 1, `logits` to all; both run the same delegates.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from bedplate.executorch_1_5 import Bool, Chain, ContainerMetadata, EValue, ExecutionPlan, Int, Null
from bedplate.link.linker import Metadata
from bedplate.link.memory import plan_memory

_CACHE_NAME = re.compile(r"^layers\.(\d+)\.([kv])_cache$")
_DYNAMIC = 1
_FLOAT = 6


def forward_method(lowered: Any) -> Any:
    """The ExecutionPlan that returns logits [1, 1, vocab] of the last position."""
    plan = copy.deepcopy(lowered)
    plan.name = "forward"
    rows = _drop_rows_input(plan)
    plan.values[rows] = EValue(Int(1))
    for index in _after_row_slice(plan, rows):
        tensor = plan.values[index].val
        tensor.sizes[1], tensor.shape_dynamism = 1, type(tensor.shape_dynamism)(0)
    plan_memory(plan, cache_values(plan))
    return plan


def logits_method(lowered: Any, *, max_rows: int) -> Any:
    """The ExecutionPlan that returns logits [1, S, vocab] of all of up to max_rows positions.

    Its tensors are bounded by max_rows, since all logits of a long chunk would take hundreds of megabytes.
    """
    plan = copy.deepcopy(lowered)
    plan.name = "logits"
    rows = _drop_rows_input(plan)
    length = next(
        _args(step)[-1]
        for step in plan.chains[0].instructions
        if _operator(plan, step) == "aten::sym_size" and _args(step)[0] == plan.inputs[0]
    )
    for step in plan.chains[0].instructions:
        step.instr_args.args = [length if index == rows else index for index in _args(step)]
    for value in plan.values:
        if hasattr(value.val, "sizes") and int(value.val.shape_dynamism) == _DYNAMIC:
            dim = _positions_dim(value.val)
            value.val.sizes[dim] = min(value.val.sizes[dim], max_rows)
    plan_memory(plan, cache_values(plan))
    return plan


def _positions_dim(tensor: Any) -> int:
    """Which dimension of a dynamic tensor of the decoder counts positions: of the masks of windows the first."""
    return 0 if len(tensor.sizes) == 2 and int(tensor.scalar_type) == _FLOAT else 1


def metadata_methods(metadata: Metadata) -> list[Any]:
    """Constant methods: no instructions, the outputs are values."""
    return [_constant_method(name, value) for name, value in sorted(metadata.items())]


def cache_values(plan: Any) -> list[int]:
    """Indices of the KV caches, by layer, k before v."""
    found = []
    for index, value in enumerate(plan.values):
        extra = getattr(value.val, "extra_tensor_info", None)
        match = _CACHE_NAME.match((extra.fully_qualified_name or "") if extra is not None else "")
        if match is not None:
            found.append((int(match[1]), match[2], index))
    return [index for _, _, index in sorted(found)]


def _drop_rows_input(plan: Any) -> int:
    """Take the third input away; return the value that held its length."""
    tensor = plan.inputs.pop()
    steps = plan.chains[0].instructions
    (sized,) = [step for step in steps if tensor in _args(step)]
    assert _operator(plan, sized) == "aten::sym_size", "only the length of the third input counts"
    steps.remove(sized)
    plan.values[tensor] = EValue(Null())
    meta = plan.container_meta_type
    encoded = json.loads(meta.encoded_inp_str)
    encoded[1]["children_spec"][0]["children_spec"].pop()
    plan.container_meta_type = ContainerMetadata(json.dumps(encoded), meta.encoded_out_str)
    return int(_args(sized)[-1])


def _after_row_slice(plan: Any, rows: int) -> list[int]:
    """Tensors that hold only the wanted rows: those first seen after the last rows were cut out."""
    starts = {
        _args(step)[-1]
        for step in plan.chains[0].instructions
        if rows in _args(step) and not _is_slice(plan, step)
    }
    seen: set[int] = set(plan.inputs)
    result: list[int] = []
    for step in plan.chains[0].instructions:
        new = [i for i in dict.fromkeys(_args(step)) if i not in seen]
        seen.update(new)
        if result or (_is_slice(plan, step) and starts & set(_args(step))):
            result += [i for i in new if getattr(plan.values[i].val, "allocation_info", None) is not None]
    return result


def _is_slice(plan: Any, step: Any) -> bool:
    return _operator(plan, step) == "aten::slice_copy"


def _operator(plan: Any, step: Any) -> str:
    index = getattr(step.instr_args, "op_index", None)
    return "" if index is None else str(plan.operators[index].name)


def _args(step: Any) -> list[int]:
    return step.instr_args.args  # type: ignore[no-any-return]


def _constant_method(name: str, value: int | bool | Sequence[int]) -> Any:
    items = [value] if isinstance(value, int) else list(value)
    values = [EValue(Bool(item) if isinstance(item, bool) else Int(item)) for item in items]
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    listed = {"type": "builtins.list", "context": "null", "children_spec": [leaf] * len(items)}
    out = leaf if isinstance(value, int) else listed
    return ExecutionPlan(
        name=name,
        container_meta_type=ContainerMetadata("", json.dumps([1, out])),
        values=values,
        inputs=[],
        outputs=list(range(len(values))),
        chains=[Chain(inputs=[], outputs=[], instructions=[], stacktrace=None)],
        operators=[],
        delegates=[],
        non_const_buffer_sizes=[0],
    )
