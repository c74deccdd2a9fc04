"""The order of the rows of q and k: as transformers has it, and as files of other tools do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bedplate.spec import ModelSpec


def halves_apart(b: NDArray[np.float32], linear: str, spec: ModelSpec) -> NDArray[np.float32]:
    """B of a linear, [rows, rank], from a tool that rotates neighbouring rows of a head, in transformers' order.

    transformers rotates row i of a head with row i + head_dim / 2. Meta's own order, which llama.cpp and torchtune
    keep for Llama, has the two side by side. Only q and k are rotated: other linears come back as they are, and so
    does what does not fit the model's heads.
    """
    heads = {"self_attn.q_proj": spec.n_heads, "self_attn.k_proj": spec.n_kv_heads}.get(linear)
    if heads is None or b.ndim != 2 or b.shape[0] != heads * spec.head_dim:
        return b
    by_head = b.reshape(heads, spec.head_dim // 2, 2, b.shape[1])
    return np.ascontiguousarray(by_head.swapaxes(1, 2)).reshape(b.shape)
