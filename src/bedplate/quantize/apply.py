"""A recipe and a decoder → the eager quantized decoder, and a recipe and a tensor → constants."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bedplate.constants import Constant
from bedplate.model.decoder import Decoder
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.packing import pack_embedding, pack_float, pack_linear
from bedplate.quantize.plan import plan
from bedplate.quantize.recipe import Recipe, Scheme
from bedplate.quantize.weights import QuantizedWeight, quantize_weight


def quantize_decoder(decoder: Decoder, recipe: Recipe) -> Decoder:
    """Replace the linears and the embedding of a float decoder in place, as the recipe says; return it."""
    for path, scheme in plan(decoder, recipe).items():
        if scheme.bits is None:
            continue
        module = decoder.get_submodule(path)
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight = quantize_weight(module.weight.detach(), scheme)
        replacement: nn.Module = (
            QuantizedEmbedding(weight)
            if isinstance(module, nn.Embedding)
            else QuantizedLinear(weight, None if module.bias is None else module.bias.detach())
        )
        parent, _, leaf = path.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, replacement)
    return decoder


def pack_tensor(name: str, value: Tensor, schemes: Mapping[str, Scheme]) -> list[Constant]:
    """Constants of the parameter `name` (`….q_proj.weight`), by the scheme of its module.

    schemes: as `plan` gives them. What has no scheme (norms) is a float32 tensor of the program.
    """
    path, _, leaf = name.rpartition(".")
    scheme = schemes.get(path) or schemes.get(f"{path}.linear")
    value = value.detach().to(torch.float32).contiguous()
    is_embedding = path == "embed_tokens"
    if scheme is None or scheme.bits is None or leaf == "bias":
        is_tensor = scheme is None or is_embedding
        return pack_float(name, value.numpy(), is_tensor=is_tensor)
    return pack_quantized(name, quantize_weight(value, scheme), is_embedding=is_embedding)


def pack_quantized(name: str, weight: QuantizedWeight, *, is_embedding: bool) -> list[Constant]:
    """Constants of a quantized weight: its codes and its scales."""
    codes, scales = weight.codes.numpy(), weight.scales.numpy()
    if is_embedding:
        return pack_embedding(name, codes, scales, bits=weight.bits)
    return pack_linear(name, codes, scales, bits=weight.bits, group_size=weight.group_size)
