"""The order of the rows of q and k: as transformers has it, and as files of other tools do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bedplate.model.rotary_order import in_our_order, turned_heads
from bedplate.spec import ModelSpec, RotaryRows


def halves_apart(b: NDArray[np.float32], linear: str, spec: ModelSpec) -> NDArray[np.float32]:
    """B of a linear, [rows, rank], or its magnitudes, [rows], in transformers' order.

    They come from a tool that rotates neighbouring rows of a head.

    transformers rotates row i of a head with row i + head_dim / 2. Meta's own order, which llama.cpp and torchtune
    keep for Llama, has the two side by side. Only q and k are rotated: other linears come back as they are, and so
    does what does not fit the model's heads.
    """
    heads = turned_heads(linear, spec)
    if not heads or b.ndim not in (1, 2) or b.shape[0] != heads * spec.head_dim:
        return b
    return in_our_order(b, heads, RotaryRows(width=spec.head_dim, interleaved=True))
