"""One float tensor → integer codes and scales, by torchao."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A symmetric quantized matrix: W ≈ codes · scales, each scale over `group_size` columns of its row.

    codes: int8 [rows, columns], within [-8, 7] for 4 bits. scales: float32 [rows, groups].
    """

    codes: Tensor
    scales: Tensor
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        return self.codes.float() * self.scales.repeat_interleave(self.group_size, dim=1)


def quantize_weight(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize float32 [rows, columns]. The scheme has bits 4 or 8.

    Raises RecipeError for values so large that no scale is found.
    """
    assert scheme.bits is not None and weight.ndim == 2
    group_size = scheme.group_size or weight.shape[1]
    four, eight = torch.int4, torch.int8  # type: ignore[attr-defined]  # torch's stubs lack int4
    target = four if scheme.bits == 4 else eight
    method = scheme.method if scheme.bits == 4 else "plain"
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, group_size), target, intx_choose_qparams_algorithm=_ALGORITHMS[method]
    )
    if not torch.isfinite(quantized.scale).all():
        raise RecipeError(
            f"{method} finds no scale for values as large as {weight.abs().max():.3g}",
            hint="are the weights right? if so, use the method plain",
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
    return QuantizedWeight(
        codes=quantized.qdata.contiguous(),
        scales=quantized.scale.reshape(weight.shape[0], -1).float(),
        bits=scheme.bits,
        group_size=group_size,
    )
