"""The order of the rows of q and k: as the model's own files have it, and as everything behind `model/` has it.

Behind `model/`, row i of a head turns with row i + head_dim / 2, and a pair that does not turn has the frequency 0.
Files may have the two rows of a pair side by side (`interleaved`), and may turn only the first rows of a head.
Needs no torch.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from bedplate.spec import ModelSpec, RotaryRows

_Array = TypeVar("_Array")
_TURNED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.q_norm", "self_attn.k_norm")


def turned_heads(module: str, spec: ModelSpec) -> int:
    """How many heads a module of a layer (`self_attn.q_proj`) has rows for that turn. 0: none of its rows do."""
    if module not in _TURNED:
        return 0
    if module.endswith("_norm") and spec.qk_norm == "head":
        return 1
    return spec.n_heads if module.startswith("self_attn.q") else spec.n_kv_heads


def in_our_order(rows: _Array, heads: int, files: RotaryRows) -> _Array:
    """An array or tensor [heads · head_dim, …] whose rows stand as in files."""
    shape = rows.shape  # type: ignore[attr-defined]
    head_dim = shape[0] // heads
    order = list(_order(head_dim, files))
    if order == list(range(head_dim)):
        return rows
    by_head: Any = rows.reshape(heads, head_dim, *shape[1:])  # type: ignore[attr-defined]
    return by_head[:, order].reshape(shape)  # type: ignore[no-any-return]


@functools.cache
def _order(head_dim: int, files: RotaryRows) -> tuple[int, ...]:
    """Where in a head of the files each row of ours stands."""
    turning = range(files.width)
    low = turning[0::2] if files.interleaved else turning[: files.width // 2]
    high = turning[1::2] if files.interleaved else turning[files.width // 2 :]
    still = range(files.width, head_dim)
    half = head_dim // 2 - len(low)
    return (*low, *still[:half], *high, *still[half:])
