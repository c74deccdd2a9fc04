"""One delegate of a program as a program of its own, so that its output can be looked at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary
from executorch.exir.schema import ContainerMetadata, EValue, Null


def cut_delegate(program: Path, index: int, out: Path) -> tuple[list[tuple[int, ...]], int]:
    """Write the `index`-th delegate of `forward` as the program `out`.

    Returns the shapes of its activation inputs (at their upper bound), in order, and how many outputs it has.
    """
    loaded = deserialize_pte_binary(program.read_bytes()).program
    plan = copy.deepcopy(loaded.execution_plan[0])
    calls = [step for step in plan.chains[0].instructions if hasattr(step.instr_args, "delegate_index")]
    call = calls[index]
    before: set[int] = set(plan.inputs)
    for step in plan.chains[0].instructions[: plan.chains[0].instructions.index(call)]:
        before.update(step.instr_args.args)
    planned = [i for i in call.instr_args.args if _is_planned(plan, i)]
    plan.inputs = [i for i in planned if i in before]
    plan.outputs = [i for i in planned if i not in before]
    plan.chains[0].instructions = [call]
    plan.container_meta_type = ContainerMetadata("", "")
    offset = 0  # nothing may overlap now that inputs and outputs live together
    for i in planned:
        tensor = plan.values[i].val
        tensor.allocation_info.memory_id, tensor.allocation_info.memory_offset_low = 1, offset
        size = 4
        for extent in tensor.sizes:
            size *= extent
        offset += -(-size // 64) * 64
    plan.non_const_buffer_sizes = [0, offset]
    plan.values = [
        value if i in call.instr_args.args else EValue(Null()) for i, value in enumerate(plan.values)
    ]
    loaded.execution_plan = [plan]
    out.write_bytes(bytes(serialize_pte_binary(PTEFile(program=loaded))))
    return [tuple(plan.values[i].val.sizes) for i in plan.inputs], len(plan.outputs)


def _is_planned(plan: Any, index: int) -> bool:
    return getattr(plan.values[index].val, "allocation_info", None) is not None
