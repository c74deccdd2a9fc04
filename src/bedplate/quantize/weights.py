"""One float tensor → integer codes and scales, by torchao."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
    IntxChooseQParamsAlgorithm,
)

from bedplate.errors import RecipeError
from bedplate.quantize.recipe import Scheme

_ALGORITHMS = {
    "plain": IntxChooseQParamsAlgorithm.AFFINE,
    "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
}

_BLOCK_NUMBERS = 1 << 18
# Shares of a group's range that its codes may cover: cutting the ends off makes the steps between finer.
_RANGES = (1.0, 0.94, 0.88, 0.82, 0.76)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A symmetric quantized matrix: W ≈ codes · scales, each scale over `group_size` columns of its row.

    codes: int8 [rows, columns], within [-8, 7] for 4 bits. scales: float32 [rows, groups].
    weight_only: meant for inputs that stay float32.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int
    weight_only: bool = False

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        return self.codes.float() * self.scales.repeat_interleave(self.group_size, dim=1)


def quantize_weight(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize a matrix of floats, [rows, columns], in float32. The scheme has bits 4 or 8.

    Goes by blocks of rows, so that beside codes and scales it needs little memory and stays in the processor's cache.
    Raises RecipeError for values so large that no scale is found.
    """
    assert scheme.bits is not None and weight.ndim == 2
    rows, columns = weight.shape
    group_size = scheme.group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group_size)
    for block in row_blocks(weight):
        codes[block], scales[block] = _quantize_block(weight[block].float(), scheme, group_size)
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        bits=scheme.bits,
        group_size=group_size,
        weight_only=scheme.weight_only,
    )


def quantize_with_offsets(
    weight: Tensor, group_size: int, importance: Tensor | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """W ≈ codes · scales + offsets: 4-bit codes that cover each group's own range, and offsets float32 [rows, groups].

    Of some narrower ranges the one with the least squared error counts, columns weighted by `importance` (float32
    [columns]). A matrix that was stored so once, as in GGUF's Q4_1, is found again, up to the rounding of scales.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales, offsets = (torch.empty(rows, columns // group_size) for _ in range(2))
    for block in row_blocks(weight):
        codes[block], scales[block], offsets[block] = _offset_block(
            weight[block].float(), group_size, importance
        )
    return QuantizedWeight(codes=codes, scales=scales, bits=4, group_size=group_size), offsets


def _offset_block(
    weight: Tensor, group_size: int, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.reshape(len(weight), -1, group_size)
    weights = torch.ones(groups.shape[1:])
    if importance is not None:
        weights = importance.clamp_min(importance.mean() * 1e-6).view(groups.shape[1:])
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    code, scale, offset = torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    for share in _RANGES:
        found = _cover(groups, weights, (high + low) / 2, (high - low) / 2 * share)
        error = ((groups - found[0] * found[1] - found[2]).square() * weights).sum(-1, keepdim=True)
        better = error < least
        code, scale, offset = (
            torch.where(better, new, old) for new, old in zip(found, (code, scale, offset), strict=True)
        )
        least = torch.where(better, error, least)
    return code.to(torch.int8).view(weight.shape), scale.squeeze(-1), offset.squeeze(-1)


def _cover(groups: Tensor, weights: Tensor, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes that cover middle ± half from end to end, their scales, and the offsets of least error for them."""
    scale = (half / 7.5).clamp_min(torch.finfo(torch.float32).tiny * 16).to(torch.bfloat16).float()
    offset = middle + scale / 2  # code -8 lies at the lower end, code 7 at the upper
    code = ((groups - offset) / scale).round().clamp(-8, 7)
    left = ((groups - code * scale - offset) * weights).sum(-1, keepdim=True)
    return code, scale, offset + left / weights.sum(-1, keepdim=True)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows that together make the matrix, each of some 2^18 numbers."""
    step = max(1, _BLOCK_NUMBERS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def _quantize_block(weight: Tensor, scheme: Scheme, group_size: int) -> tuple[Tensor, Tensor]:
    if (
        group_size == 1
    ):  # torchao would take one scale for the whole matrix: a zero beside each number changes nothing
        with_zeros = torch.stack((weight, torch.zeros_like(weight)), dim=-1).flatten(1)
        codes, scales = _quantize_block(with_zeros, scheme, 2)
        return codes[:, ::2], scales
    four, eight = torch.int4, torch.int8  # type: ignore[attr-defined]  # torch's stubs lack int4
    target = four if scheme.bits == 4 else eight
    method = scheme.method if scheme.bits == 4 else "plain"
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, group_size), target, intx_choose_qparams_algorithm=_ALGORITHMS[method]
    )
    if not torch.isfinite(quantized.scale).all():
        raise RecipeError(
            f"{method} finds no scale for values as large as {weight.abs().max():.3g}",
            hint="check the weights; if they are right, use the method plain",
        )
    if scheme.group_size is not None:
        # XNNPACK keeps the scale of a group as bfloat16: round it, and choose the codes for the rounded scale.
        scale = quantized.scale.to(torch.bfloat16).to(weight.dtype)
        quantized = IntxUnpackedToInt8Tensor.from_hp(
            weight,
            (1, group_size),
            target,
            intx_choose_qparams_algorithm=None,
            custom_scale=scale,
            custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
        )
    assert not quantized.zero_point.any(), "symmetric quantization has no zero points"
    return quantized.qdata, quantized.scale.reshape(weight.shape[0], -1)
