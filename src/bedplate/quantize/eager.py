"""A recipe and a decoder → the eager quantized decoder."""

from __future__ import annotations

from torch import nn

from bedplate.model.decoder import Decoder
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.plan import plan
from bedplate.quantize.recipe import Recipe
from bedplate.quantize.weights import quantize_weight


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
