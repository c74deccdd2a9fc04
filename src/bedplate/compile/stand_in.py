"""A decoder of stand-in weights: random, seeded, each different, so that each constant is known by its bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from bedplate.compile.units import Structure
from bedplate.constants import Constant
from bedplate.model.decoder import Decoder
from bedplate.model.load import set_parameter
from bedplate.quantize.foundation import pack_quantized
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.packing import pack_float
from bedplate.quantize.plan import plan
from bedplate.quantize.recipe import Scheme
from bedplate.quantize.weights import QuantizedWeight
from bedplate.spec import LayerSpec, ModelSpec

_LAYER = re.compile(r"^layers\.\d+\.")
_NORM = re.compile(r"norm\.(weight|bias)$")


def structure_schemes(structure: Structure) -> dict[str, Scheme]:
    """The scheme of each weight by module path, at the structure's own depth. Raises RecipeError."""
    decoder = _decoder(structure, structure.spec, max_context=1)
    return plan(decoder, structure.recipe)


def stand_in_decoder(
    structure: Structure, layers: Sequence[LayerSpec]
) -> tuple[Decoder, dict[str, Constant]]:
    """A decoder of these layers, otherwise of the structure, with stand-in weights, and its constants by symbol.

    Structures differ in their symbols' values only by the symbol's name, so compiling is deterministic.
    """
    spec = replace(structure.spec, layers=tuple(layers))
    decoder = _decoder(structure, spec, max_context=structure.max_context)
    schemes = structure_schemes(structure)
    constants: dict[str, Constant] = {}

    def note(packed: list[Constant]) -> None:
        constants.update({constant.name: constant for constant in packed})

    weighted = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    for path, module in weighted:
        scheme = schemes.get(path) or schemes[_LAYER.sub("layers.0.", path)]
        is_embedding = isinstance(module, nn.Embedding)
        symbol = logical_path(path)
        bias = None
        if isinstance(module, nn.Linear) and module.bias is not None:
            bias = _values(f"{symbol}.bias", module.bias.shape)
        if scheme.bits is None:
            value = _values(f"{symbol}.weight", module.weight.shape)
            set_parameter(decoder, f"{path}.weight", value)
            note(pack_float(f"{symbol}.weight", value.numpy(), is_tensor=is_embedding))
            if bias is not None:
                set_parameter(decoder, f"{path}.bias", bias)
        else:
            weight = _quantized(f"{symbol}.weight", module.weight.shape, scheme)
            parent, _, leaf = path.rpartition(".")
            replacement = QuantizedEmbedding(weight) if is_embedding else QuantizedLinear(weight, bias)
            setattr(decoder.get_submodule(parent), leaf, replacement)
            note(pack_quantized(f"{symbol}.weight", weight, is_embedding=is_embedding))
        if bias is not None:
            note(pack_float(f"{symbol}.bias", bias.numpy(), is_tensor=False))
    for name, parameter in list(decoder.named_parameters()):
        if _NORM.search(name):
            value = _values(name, parameter.shape)
            set_parameter(decoder, name, value)
            note(pack_float(name, value.numpy(), is_tensor=True))
    return decoder.eval(), constants


def fixed_buffers(decoder: nn.Module) -> dict[str, Constant]:
    """What a decoder's modules hold that does not depend on weights, by module path."""
    stored = decoder.state_dict().keys()
    return {
        path: pack_float(path, value.numpy(), is_tensor=True)[0]
        for path, value in decoder.named_buffers()
        if path not in stored and not path.endswith("_cache")
    }


def _decoder(structure: Structure, spec: ModelSpec, *, max_context: int) -> Decoder:
    return Decoder(
        spec,
        max_context=max_context,
        max_chunk=min(structure.max_chunk, max_context),
        ranks=structure.ranks,
        corrections=structure.corrections,
        device="meta",
    )


def logical_path(path: str) -> str:
    """A linear's name with and without a LoRA branch beside it: `….q_proj`, not `….q_proj.linear`."""
    return path.removesuffix(".linear")


def _generator(symbol: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(symbol.encode()).digest()[:8], "little"))


def _values(symbol: str, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(_generator(symbol).standard_normal(tuple(shape), dtype=np.float32) * 0.02)


def _quantized(symbol: str, shape: torch.Size, scheme: Scheme) -> QuantizedWeight:
    rows, columns = shape
    group_size = scheme.group_size or columns
    low, high = (-8, 8) if scheme.bits == 4 else (-128, 128)
    generator = _generator(symbol)
    codes = generator.integers(low, high, (rows, columns), dtype=np.int8)
    scales = generator.uniform(1e-3, 2e-3, (rows, columns // group_size)).astype(np.float32)
    rounded = torch.from_numpy(scales)
    if scheme.group_size is not None:
        rounded = rounded.to(torch.bfloat16).float()
    assert scheme.bits is not None
    return QuantizedWeight(
        codes=torch.from_numpy(codes),
        scales=rounded,
        bits=scheme.bits,
        group_size=group_size,
        weight_only=scheme.weight_only,
    )
