"""What a lowering must look like, checked; what fell out of a delegate, named."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from bedplate.errors import LoweringError
from bedplate.executorch_1_5 import executorch_call_delegate

# Operators that may stand between delegates (see docs/architecture.md).
_ALLOWED = (
    "aten.sym_size",
    "aten._local_scalar_dense",
    "aten._assert_scalar",
    "aten.slice_copy.Tensor",
    "aten.embedding",
    "quantized_decomposed.embedding_byte",
    "quantized_decomposed.embedding_4bit",
    "llama.custom_sdpa",
    "auto_functionalized",
)


def check_lowering(edge: torch.fx.GraphModule, *, n_layers: int) -> None:
    """Exactly layers + 2 delegates, and nothing but the allowed operators outside. Raises LoweringError."""
    check_delegates(edge, _ALLOWED, n_layers + 2)


def check_delegates(edge: torch.fx.GraphModule, allowed: Collection[str], expected: int) -> None:
    """Exactly this many delegates, and outside of them operators with these in their names. Raises LoweringError."""
    calls = [node for node in edge.graph.nodes if node.op == "call_function"]
    delegates = [node for node in calls if node.target is executorch_call_delegate]
    outside = [node for node in calls if node.target is not executorch_call_delegate and _is_tensor(node)]
    fallen = [node for node in outside if not any(name in str(node.target) for name in allowed)]
    if fallen:
        named = ", ".join(sorted({_describe(node) for node in fallen})[:8])
        raise LoweringError(
            f"{len(fallen)} operators fell out of the XNNPACK delegates: {named}",
            hint="this model or recipe is not lowered whole; please report it with its config.json",
        )
    if len(delegates) != expected:
        raise LoweringError(
            f"the program has {len(delegates)} XNNPACK delegates, not {expected}",
            hint="this model or recipe is not lowered whole; please report it with its config.json",
        )


def _is_tensor(node: torch.fx.Node) -> bool:
    return "getitem" not in str(node.target) and isinstance(node.meta.get("val"), torch.Tensor | tuple)


def _describe(node: torch.fx.Node) -> str:
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    operator = getattr(node.target, "__name__", str(node.target))
    return f"{operator} of {path}" if path else operator
