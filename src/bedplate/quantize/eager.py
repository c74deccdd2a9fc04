"""A recipe and a decoder → the eager quantized decoder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bedplate.model.decoder import Decoder
from bedplate.quantize.calibration import Statistics
from bedplate.quantize.correction import quantize_corrected
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.plan import plan
from bedplate.quantize.recipe import Recipe, Scheme
from bedplate.quantize.weights import QuantizedWeight, quantize_weight
from bedplate.spec import corrected_together


def quantize_decoder(decoder: Decoder, recipe: Recipe, statistics: Statistics | None = None) -> Decoder:
    """Replace the linears and the embedding of a float decoder in place, as the recipe says; return it.

    A recipe with corrections wants a decoder that has their modules, and `statistics` for directions beyond offsets.
    """
    schemes = plan(decoder, recipe)
    weights = _corrected_weights(decoder, recipe, schemes, statistics or {})
    for path, scheme in schemes.items():
        if scheme.bits is None:
            continue
        module = decoder.get_submodule(path)
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight = weights.get(path) or quantize_weight(module.weight.detach(), scheme)
        replacement: nn.Module = (
            QuantizedEmbedding(weight)
            if isinstance(module, nn.Embedding)
            else QuantizedLinear(weight, None if module.bias is None else module.bias.detach())
        )
        parent, _, leaf = path.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, replacement)
    return decoder


def _corrected_weights(
    decoder: Decoder, recipe: Recipe, schemes: Mapping[str, Scheme], statistics: Statistics
) -> dict[str, QuantizedWeight]:
    """Quantized weights of all linears that share a correction, and of the corrections, by module path."""
    weights: dict[str, QuantizedWeight] = {}
    corrections = recipe.corrections(decoder.spec)
    assert corrections == decoder.corrections, "the decoder has not the corrections of this recipe"
    for place, paths in corrected_together(decoder.spec, corrections).items():
        corrected = quantize_corrected(
            {path: decoder.get_parameter(f"{path}.weight").detach() for path in paths},
            {path: schemes.get(path) or schemes[f"{path}.linear"] for path in paths},
            rank=corrections[paths[0].split(".", 2)[2]],
            rms=statistics.get(place),
        )
        weights[f"{place}.directions"] = corrected.directions
        for path, weight in corrected.weights.items():
            weights[path if path in schemes else f"{path}.linear"] = weight
        for path, back in corrected.backs.items():
            weights[f"{place}.{path.rpartition('.')[2]}"] = back
    return weights
