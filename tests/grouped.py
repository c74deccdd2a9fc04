"""The model that a bundle is computed as: the eager quantized decoder, but inputs are quantized in groups of 32.

In a product with codes each 32 inputs are rounded to 8 bits, symmetric, from their largest. Narrow values, which the
wide halves of branches and corrections take, stay as they are.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bedplate.model.decoder import Correction, Decoder
from bedplate.quantize.modules import QuantizedLinear

GROUP = 32


class GroupedLinear(nn.Module):
    """y = x̂ Ŵᵀ + b. x̂: x in groups, or x itself."""

    def __init__(self, linear: QuantizedLinear, *, in_groups: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.in_groups = in_groups
        self.register_buffer("weight", linear.dequantized_weight())
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_groups(x) if self.in_groups else x, self.weight, self.bias)  # type: ignore[arg-type]


def in_groups(x: Tensor) -> Tensor:
    padded = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = padded.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 1e-35, largest / 127, torch.ones_like(largest))
    return ((padded / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


def grouped(decoder: Decoder) -> Decoder:
    """A copy of an eager quantized decoder that computes so."""
    decoder = copy.deepcopy(decoder)
    modules = dict(decoder.named_modules())
    for path, module in modules.items():
        if isinstance(module, QuantizedLinear):
            parent, _, leaf = path.rpartition(".")
            narrow = leaf == "lora_b" or (isinstance(modules[parent], Correction) and leaf != "directions")
            decoder.set_submodule(path, GroupedLinear(module, in_groups=not narrow))
    return decoder
