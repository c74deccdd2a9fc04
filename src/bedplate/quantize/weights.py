"""One float tensor → integer codes and scales: as torchao's, bit for bit (a test holds that).

torchao itself is imported for `hqq` alone: it takes longer to import than torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bedplate import _native
from bedplate.errors import RecipeError
from bedplate.quantize.recipe import Scheme

_BLOCK_NUMBERS = 1 << 17


class Matrix(Protocol):
    """Rows of floats: a tensor [rows, columns], or what reads such rows when they are asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


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


def quantize_weight(weight: Matrix, scheme: Scheme) -> QuantizedWeight:
    """Quantize a matrix of floats, [rows, columns], in float32. The scheme has bits 4 or 8.

    Goes by blocks of rows, so that beside codes and scales it needs little memory and stays in the processor's cache.
    Raises RecipeError for values so large that no scale is found.
    """
    assert scheme.bits is not None
    rows, columns = weight.shape
    group_size = scheme.group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group_size)
    with _one_thread():
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
    weights = None
    if importance is not None:
        weights = importance.clamp_min(importance.mean() * 1e-6).numpy()
    for block in row_blocks(weight):
        _native.quantize_with_offsets(
            values=weight[block].float().contiguous().numpy(),
            group=group_size,
            importance=weights,
            codes=codes[block].numpy(),
            scales=scales[block].numpy(),
            offsets=offsets[block].numpy(),
        )
    return QuantizedWeight(codes=codes, scales=scales, bits=4, group_size=group_size), offsets


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in one thread: for a block, it takes longer to share the work than to do it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_blocks(matrix: Matrix) -> Iterator[slice]:
    """Slices of rows that together make the matrix, each of some 2^17 numbers."""
    step = max(1, _BLOCK_NUMBERS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def _quantize_block(weight: Tensor, scheme: Scheme, group_size: int) -> tuple[Tensor, Tensor]:
    low, high = (-8, 7) if scheme.bits == 4 else (-128, 127)
    groups = weight.reshape(len(weight), -1, group_size)
    if scheme.bits == 4 and scheme.method == "hqq":
        codes, scale = _hqq(weight, group_size)
    else:
        scale = (groups.abs().amax(-1) / ((high - low) / 2)).clamp_min(torch.finfo(torch.float32).tiny)
        codes = None
    if scheme.group_size is not None:
        # XNNPACK keeps the scale of a group as bfloat16: round it, and choose the codes for the rounded scale.
        scale, codes = scale.to(torch.bfloat16).float(), None
    if codes is None:
        codes = (groups * (1.0 / scale.unsqueeze(-1))).round_().clamp_(low, high).to(torch.int8)
    return codes.view(weight.shape), scale


def _hqq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits and their scales, by torchao. RecipeError: it finds no scale."""
    from bedplate.quiet import import_modules

    import_modules(("torchao",))
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm,
    )

    if (
        group_size == 1
    ):  # torchao would take one scale for all of it. A zero beside each number changes nothing
        weight = torch.stack((weight, torch.zeros_like(weight)), dim=-1).flatten(1)
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, max(group_size, 2)),
        torch.int4,  # type: ignore[attr-defined]  # torch's stubs lack it
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    if not torch.isfinite(quantized.scale).all():
        raise RecipeError(
            f"hqq finds no scale for values as large as {weight.abs().max():.3g}",
            hint="check the weights; if they are right, use the method plain",
        )
    codes = quantized.qdata[:, ::2] if group_size == 1 else quantized.qdata
    return codes, quantized.scale.reshape(len(weight), -1)
