"""Quantized or float tensors → constants, laid out byte for byte as ExecuTorch's lowering lays them out.

The layout is not assumed: `compile` compares every constant of the layers that it really lowers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bedplate.constants import TENSOR, Constant
from bedplate.names import CODES, SCALES


def pack_nibbles(codes: NDArray[np.int8], *, low_first: bool) -> NDArray[np.uint8]:
    """int8 [rows, columns] in [-8, 7] → uint8 [rows, columns / 2], codes + 8, two a byte.

    low_first: whether the even column takes the low four bits (XNNPACK) or the high four (`embedding_4bit`).
    """
    shifted = codes.view(np.uint8) + np.uint8(8)  # wraps around: -8 is 248, and 248 + 8 is 0
    even, odd = shifted[:, 0::2], shifted[:, 1::2]
    low, high = (even, odd) if low_first else (odd, even)
    packed: NDArray[np.uint8] = np.left_shift(high, np.uint8(4)) | low
    return packed


def pack_float(name: str, value: NDArray[np.float32], *, is_tensor: bool) -> list[Constant]:
    """A float32 tensor: a linear or bias that a delegate reads, or (`is_tensor`) one that the program holds."""
    layout = TENSOR if is_tensor else "dense"
    return [Constant.of(name, "float32", value.shape, layout, _bytes(value))]


def pack_linear(
    name: str,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    *,
    bits: int,
    group_size: int,
    weight_only: bool = False,
) -> list[Constant]:
    """Codes and scales of a linear, as XNNPACK reads them.

    weight_only counts for the key alone: XNNPACK packs the same codes otherwise for inputs that stay float32.
    4 bits: two codes a byte, offset by 8, the even column low. Scales of groups are bfloat16, of rows float32.
    """
    rows, columns = codes.shape
    per_row = group_size == columns and scales.shape[1] == 1
    data = _bytes(pack_nibbles(codes, low_first=True) if bits == 4 else codes)
    scale_data = _bytes(scales.reshape(-1)) if per_row else _bfloat16_bytes(scales)
    scale_dtype = "float32" if per_row else "bfloat16"
    groups = "row" if per_row else f"group {group_size}"
    layout = f"linear, {groups} {scale_dtype} scales, symmetric{', weight only' if weight_only else ''}"
    dtype = "int4" if bits == 4 else "int8"
    held = Constant.of(name + SCALES, scale_dtype, scales.shape, "scales", scale_data)
    return [Constant.of(name + CODES, dtype, (rows, columns), layout, data, held), held]


def pack_embedding(
    name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], *, bits: int
) -> list[Constant]:
    """Codes and scales of an embedding, as `embedding_byte` and `embedding_4bit` read them (even column high)."""
    table = pack_nibbles(codes, low_first=False) if bits == 4 else codes
    scales = scales.reshape(-1) if scales.shape[1] == 1 else scales
    dtype = "uint8" if bits == 4 else "int8"
    parts = ((CODES, dtype, table), (SCALES, "float32", scales))
    return [
        Constant.of(name + part, part_dtype, value.shape, TENSOR, _bytes(value))
        for part, part_dtype, value in parts
    ]


def _bytes(value: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _bfloat16_bytes(value: NDArray[np.float32]) -> NDArray[np.uint8]:
    bits = np.ascontiguousarray(value, dtype=np.float32).reshape(-1).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "scales are rounded to bfloat16 where they are chosen"
    return _bytes((bits >> 16).astype(np.uint16))
