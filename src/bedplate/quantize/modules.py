"""Modules that compute with quantized weights, in the operators that ExecuTorch lowers to XNNPACK and its kernels.

In eager mode they are the reference that a lowered program is compared with.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

import bedplate.executorch_1_5  # noqa: F401  registers embedding_byte, embedding_4bit
from bedplate.quantize.activations import eight_bit_rows
from bedplate.quantize.packing import pack_nibbles
from bedplate.quantize.weights import QuantizedWeight

_Q = torch.ops.quantized_decomposed


class QuantizedLinear(nn.Module):
    """y = x̂ Ŵᵀ + b: x quantized to 8 bits a row as it comes (asymmetric), W held as codes and scales.

    A weight-only W takes x as it is.

    codes int8 [out, in]; scales float32 [out, groups], or [out] with one scale a row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        per_row = weight.scales.shape[1] == 1 and weight.group_size == weight.codes.shape[1]
        self.group_size = None if per_row else weight.group_size
        self.bits, self.weight_only = weight.bits, weight.weight_only
        self.out_features, self.in_features = weight.codes.shape
        scales = weight.scales.flatten() if per_row else weight.scales
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int64 if per_row else torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.weight_only else eight_bit_rows(x)
        return F.linear(x, self.dequantized_weight(), self.bias)

    def dequantized_weight(self) -> Tensor:
        """float32 [out, in]."""
        low, high = (-8, 7) if self.bits == 4 else (-128, 127)
        if self.group_size is None:
            weight = _Q.dequantize_per_channel(self.codes, self.scales, self.zeros, 0, low, high, torch.int8)
        else:
            weight = _Q.dequantize_per_channel_group(
                self.codes, self.scales, self.zeros, low, high, torch.int8, self.group_size, torch.float32
            )
        return weight  # type: ignore[no-any-return]


class QuantizedEmbedding(nn.Module):
    """A lookup in a table of codes. 4 bits: two codes a byte, a scale a group; 8 bits: a scale a row.

    codes uint8 [vocab, dim / 2] or int8 [vocab, dim]; scales float32 [vocab, groups] or [vocab].
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.bits = weight.bits
        per_row = weight.scales.shape[1] == 1
        four = (
            torch.from_numpy(pack_nibbles(weight.codes.numpy(), low_first=False)) if self.bits == 4 else None
        )
        self.register_buffer("codes", weight.codes if four is None else four)
        self.register_buffer("scales", weight.scales.flatten() if per_row else weight.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        operator, low, high = (
            (_Q.embedding_4bit.dtype, -8, 7) if self.bits == 4 else (_Q.embedding_byte.dtype, -128, 127)
        )
        return operator(self.codes, self.scales, None, low, high, tokens, dtype=torch.float32)  # type: ignore[no-any-return]
