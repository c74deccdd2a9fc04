"""An embedding or a head of an adapter's own → constants, as the foundation has those of the base.

In numpy, but for codes that half-quadratic quantization chooses. A table that is the base's becomes the base's
constants, bit for bit (a test holds that).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bedplate.constants import Constant
from bedplate.quantize.packing import pack_embedding, pack_float, pack_linear
from bedplate.quantize.recipe import Scheme
from bedplate.quantize.rows import quantize_rows

_BLOCK_NUMBERS = 1 << 20


def pack_table(
    name: str, value: NDArray[np.float32], scheme: Scheme, *, is_embedding: bool
) -> list[Constant]:
    """value: float32 [rows, columns]. Raises RecipeError for values so large that no scale is found."""
    if scheme.bits is None:
        return pack_float(name, value, is_tensor=is_embedding)
    codes, scales = _quantized(value, scheme)
    if is_embedding:
        return pack_embedding(name, codes, scales, bits=scheme.bits)
    group_size = scheme.group_size or value.shape[1]
    return pack_linear(
        name, codes, scales, bits=scheme.bits, group_size=group_size, weight_only=scheme.weight_only
    )


def _quantized(value: NDArray[np.float32], scheme: Scheme) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    if scheme.bits == 8 and scheme.group_size is None:
        return quantize_rows(value)
    if scheme.bits == 4 and scheme.method == "plain":
        return _four_bits(value, scheme.group_size)
    import torch

    from bedplate.quantize.weights import quantize_weight

    quantized = quantize_weight(torch.from_numpy(value), scheme)
    return quantized.codes.numpy(), quantized.scales.numpy()


def _four_bits(
    value: NDArray[np.float32], group_size: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    rows, columns = value.shape
    width = group_size or columns
    codes, scales = np.empty((rows, columns), np.int8), np.empty((rows, columns // width), np.float32)
    step = max(1, _BLOCK_NUMBERS // columns)
    for first in range(0, rows, step):
        block = slice(first, first + step)
        groups = value[block].reshape(-1, columns // width, width)
        scale = np.maximum(np.abs(groups).max(-1) / np.float32(7.5), np.finfo(np.float32).tiny)
        scale = scale if group_size is None else _rounded(scale)
        scaled = np.rint(groups * (np.float32(1.0) / scale[:, :, None]))
        codes[block] = np.clip(scaled, -8, 7).astype(np.int8).reshape(-1, columns)
        scales[block] = scale
    return codes, scales


def _rounded(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest bfloat16, of two as near to the even one."""
    bits = np.ascontiguousarray(scale).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
