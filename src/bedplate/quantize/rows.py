"""8 bits with one scale a row, in numpy: how adapters are packed without torch.

The result equals torchao's symmetric quantization bit for bit (a test holds that).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bedplate.constants import Constant
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.packing import pack_float, pack_linear


def quantize_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """float32 [rows, columns] → codes int8 [rows, columns], scales float32 [rows, 1]: max|row| goes to 127.5."""
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scales = np.maximum(largest / np.float32(127.5), np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(weight * (np.float32(1.0) / scales)), -128, 127).astype(np.int8)
    return codes, scales


def pack_branch(name: str, weight: NDArray[np.float32], scheme: AdapterScheme) -> list[Constant]:
    """Constants of one half of a LoRA branch, float32 [rows, columns]."""
    if scheme == "none":
        return pack_float(name, weight, is_tensor=False)
    codes, scales = quantize_rows(weight)
    return pack_linear(name, codes, scales, bits=8, group_size=weight.shape[1], weight_only=True)
