"""The input of a quantized linear as it sees it, in the operators that ExecuTorch lowers to XNNPACK."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor

_Q = torch.ops.quantized_decomposed


def eight_bit_rows(x: Tensor) -> Tensor:
    """x float32 [..., in] with each row rounded to 8 bits, asymmetric, over its own range."""
    scale, zero = _Q.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = _Q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return _Q.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)  # type: ignore[no-any-return]
