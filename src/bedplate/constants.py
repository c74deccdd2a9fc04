"""Content keys: 64 hex characters that name a constant by all that decides how it is packed.

XNNPACK's packed-weight cache looks a weight up by the key of its integer codes (and of its bias) alone. So the
key of codes covers their scales too: B and 2·B quantize to the same codes, and must not share a packed buffer.

Whoever has a constant's bytes, and its scales, can compute its key again: `verify` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

KEY_LENGTH = 64
TENSOR = "tensor"  # the layout of what a program holds as a tensor of its own
_DOMAIN = b"bedplate constant v1"


@dataclass(frozen=True, kw_only=True, eq=False)
class Constant:
    """A packed constant: the bytes that a data file holds under `key`.

    name: the module path it comes from, for people (`layers.3.q_proj.weight`); not part of the key.
    dtype, shape: of the logical tensor: `float32`, `bfloat16`, `int64`, `int8`, `uint8`, or `int4` (two codes a byte).
    layout: how its bytes are to be read, in words; part of the key.
    data: uint8 [nbytes], C-contiguous.
    scales: of codes that a delegate reads: the constant of their scales, which the key covers.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    data: NDArray[np.uint8]
    scales: Constant | None = None

    @classmethod
    def of(
        cls,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        layout: str,
        data: NDArray[np.uint8],
        scales: Constant | None = None,
    ) -> Self:
        """A constant under the key of its content."""
        covered = () if scales is None else (scales.data,)
        key = content_key(dtype, shape, layout, data, *covered)
        return cls(key=key, name=name, dtype=dtype, shape=shape, layout=layout, data=data, scales=scales)

    @property
    def is_tensor(self) -> bool:
        """The program holds it as a tensor of its own (embedding, norms, tables), so that ExecuTorch wants its
        dtype and shape in the data file; otherwise a delegate reads it as plain bytes.
        """
        return self.layout == TENSOR

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
