"""Content keys: 64 hex characters that name a constant by all that decides how it is packed.

XNNPACK's packed-weight cache looks a weight up by the key of its integer codes (and of its bias) alone. So the
key of codes covers their scales too: B and 2·B quantize to the same codes, and must not share a packed buffer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEY_LENGTH = 64
_DOMAIN = b"bedplate constant v1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Constant:
    """A packed constant: the bytes that a data file holds under `key`.

    name: the module path it comes from, for people (`layers.3.q_proj.weight`); not part of the key.
    dtype, shape: of the logical tensor: `float32`, `bfloat16`, `int8`, `uint8`, or `int4` (two codes a byte).
    is_tensor: the program holds it as a tensor of its own (embedding, norms, tables), so that ExecuTorch
        wants its layout in the data file; otherwise it is read by a delegate as plain bytes.
    data: uint8 [nbytes], C-contiguous.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    is_tensor: bool
    data: NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def content_key(
    dtype: str, shape: Sequence[int], layout: str, data: NDArray[np.uint8], *covered: NDArray[np.uint8]
) -> str:
    """SHA-256 over dtype, shape, layout, the bytes, and whatever else decides the packing (`covered`).

    Every part goes in with its length, so that no two different lists of parts hash alike.
    """
    header = f"{dtype}|{','.join(map(str, shape))}|{layout}".encode()
    digest = hashlib.sha256(_DOMAIN)
    for part in (memoryview(header), data.data, *(array.data for array in covered)):
        digest.update(part.nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
