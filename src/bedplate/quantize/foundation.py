"""A checkpoint's tensors → the foundation's constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bedplate import _native
from bedplate.constants import Constant
from bedplate.model.masks import window_mask
from bedplate.model.parts import Cap, RMSNorm, Rope, Scale, activation, query_factors, scaled
from bedplate.names import ROW_NORMS
from bedplate.quantize.correction import Corrected
from bedplate.quantize.packing import pack_embedding, pack_float, pack_linear
from bedplate.quantize.recipe import Scheme
from bedplate.quantize.weights import Matrix, QuantizedWeight, quantize_weight, row_blocks
from bedplate.spec import ModelSpec, growing, narrow_windows, qk_norm_shapes


def pack_tensor(
    names: Sequence[str], value: Tensor | Matrix, schemes: Mapping[str, Scheme]
) -> Iterator[Constant]:
    """Constants of the parameters `names` (`….q_proj.weight`), which share one value, by the schemes of their modules.

    schemes: as `plan` gives them. What has no scheme (norms) is a float32 tensor of the program. Raises RecipeError.
    """
    quantized: dict[Scheme, QuantizedWeight] = {}  # a tied head is often stored as the embedding is
    for name in names:
        path, _, leaf = name.rpartition(".")
        scheme = schemes.get(path) or schemes.get(f"{path}.linear")
        is_embedding = path == "embed_tokens"
        if scheme is None or scheme.bits is None or leaf == "bias":
            yield from pack_float(name, _floats(value), is_tensor=scheme is None or is_embedding)
            continue
        if scheme not in quantized:
            quantized[scheme] = quantize_weight(value, scheme)
        yield from pack_quantized(name, quantized[scheme], is_embedding=is_embedding)
        if not is_embedding:
            yield row_norms(path, value)


def _floats(value: Tensor | Matrix) -> NDArray[np.float32]:
    if isinstance(value, Tensor):
        return value.to(torch.float32).contiguous().numpy()
    floats = np.empty(value.shape, np.float32)
    for block in row_blocks(value):
        floats[block] = value[block].to(torch.float32).numpy()
    return floats


def row_norms(path: str, weight: Matrix) -> Constant:
    """The squared lengths of the rows of a linear's weight [rows, columns], before quantization: DoRA needs them."""
    squares = np.empty(weight.shape[0], np.float32)
    for block in row_blocks(weight):
        _native.squares(weight[block].float().contiguous().numpy(), squares[block])
    return pack_float(f"{path}.{ROW_NORMS}", squares, is_tensor=False)[0]


def fixed_constants(spec: ModelSpec, max_context: int, max_chunk: int) -> dict[str, Constant]:
    """The constants of programs that do not depend on weights, in the order of their names.

    Every foundation holds them, so that it is the same with programs of any kind and without.
    """
    delegates = dict(_norm_constants(spec))
    tensors = dict(_scalars(spec))
    rope = Rope(spec.used_ropes, spec.head_dim, max_context)
    for name, value in rope.named_buffers():
        (delegates if name == "rotation" else tensors)[f"rope.{name}"] = value
    if (growth := growing(spec, max_context)) is not None:
        tensors["query_factors"] = query_factors(growth, max_context)
    for window in narrow_windows(spec, max_context):
        tensors[f"masks.window_{window}"] = window_mask(window, max_context, max_chunk)
    packed = [pack_float(name, value.numpy(), is_tensor=False)[0] for name, value in delegates.items()]
    packed += [pack_float(name, value.numpy(), is_tensor=True)[0] for name, value in tensors.items()]
    return {constant.name: constant for constant in sorted(packed, key=lambda constant: constant.name)}


def _norm_constants(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    norm = RMSNorm(spec.dim, spec.norm_eps)
    yield "rms_norm.mean_row", norm.mean_row
    yield "rms_norm.eps", norm.eps
    for part, shape in qk_norm_shapes(spec).items():
        yield f"{part}_norm.mean_row", RMSNorm(*shape, spec.norm_eps).mean_row


def _scalars(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    for name in ("embedding_scale", "residual_scale", "logit_scale"):
        for value in scaled(getattr(spec, name)).buffers():
            yield name, value
    yield "attention_scale", Scale(spec.attention_scale).factor
    for name in ("score_cap", "logit_cap"):
        if (limit := getattr(spec, name)) is not None:
            yield name, Cap(limit).limit
    for leaf, value in activation(spec.activation).named_buffers():
        yield f"{spec.activation}.{leaf}", value


def pack_corrected(place: str, corrected: Corrected) -> Iterator[Constant]:
    """Constants of linears of one input (`….q_proj` → weight) and of their correction at the module path `place`."""
    for path, weight in corrected.weights.items():
        yield from pack_quantized(f"{path}.weight", weight, is_embedding=False)
    yield from pack_quantized(f"{place}.directions.weight", corrected.directions, is_embedding=False)
    for path, back in corrected.backs.items():
        name = f"{place}.{path.rpartition('.')[2]}.weight"
        yield from pack_quantized(name, back, is_embedding=False)


def pack_quantized(name: str, weight: QuantizedWeight, *, is_embedding: bool) -> list[Constant]:
    """Constants of a quantized weight: its codes and its scales."""
    codes, scales = weight.codes.numpy(), weight.scales.numpy()
    if is_embedding:
        return pack_embedding(name, codes, scales, bits=weight.bits)
    return pack_linear(
        name,
        codes,
        scales,
        bits=weight.bits,
        group_size=weight.group_size,
        weight_only=weight.weight_only,
    )
