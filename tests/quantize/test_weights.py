"""One tensor → codes and scales: torchao's, with group scales that bfloat16 holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from bedplate.errors import RecipeError
from bedplate.quantize.recipe import WEIGHT_ONLY, Scheme
from bedplate.quantize.rows import quantize_rows
from bedplate.quantize.weights import quantize_weight

SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=4, group_size=32),
    Scheme(bits=4, group_size=64, method="hqq"),
    Scheme(bits=4),
    Scheme(bits=4, method="hqq"),
]


def heavy_tailed(rows: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * (1 + 4 * torch.rand(rows, columns) ** 8) * 0.05


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme}, {scheme.method}")
def test_codes_times_scales_is_the_weight(scheme: Scheme) -> None:
    weight = heavy_tailed(48, 128)
    quantized = quantize_weight(weight, scheme)
    groups = 128 // (scheme.group_size or 128)
    assert quantized.codes.shape == (48, 128) and quantized.codes.dtype == torch.int8
    assert quantized.scales.shape == (48, groups) and quantized.scales.dtype == torch.float32
    low, high = (-8, 7) if scheme.bits == 4 else (-128, 127)
    assert int(quantized.codes.min()) >= low and int(quantized.codes.max()) <= high
    error = (quantized.dequantize() - weight).abs()
    scales = quantized.scales.repeat_interleave(quantized.group_size, dim=1)
    inside = (weight / scales >= low) & (weight / scales <= high)
    assert (
        error[inside] <= 0.5001 * scales[inside]
    ).all()  # what is not clipped is rounded to the nearest code
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme}, {scheme.method}")
def test_scales_of_groups_are_bfloat16(scheme: Scheme) -> None:
    scales = quantize_weight(heavy_tailed(48, 128), scheme).scales
    is_bfloat16 = torch.equal(scales, scales.to(torch.bfloat16).float())
    assert is_bfloat16 == (scheme.group_size is not None)


def test_codes_are_chosen_for_the_rounded_scale() -> None:
    weight = heavy_tailed(48, 128)
    quantized = quantize_weight(weight, Scheme(bits=4, group_size=32))
    rounded = quantized.scales.repeat_interleave(32, dim=1)
    torch.testing.assert_close(
        quantized.codes, (weight * (1 / rounded)).round().clamp(-8, 7).to(torch.int8), rtol=0, atol=0
    )
    plain = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), torch.int4)  # type: ignore[attr-defined]
    assert not torch.equal(plain.qdata, quantized.codes)


def test_hqq_comes_nearer_than_plain_scales() -> None:
    weight = heavy_tailed(64, 128)
    plain, hqq = (
        quantize_weight(weight, Scheme(bits=4, group_size=32, method=method)).dequantize()
        for method in ("plain", "hqq")
    )
    assert (hqq - weight).abs().mean() < (plain - weight).abs().mean()


def test_hqq_is_of_4_bits_only() -> None:
    weight = heavy_tailed(8, 64)
    one, two = (quantize_weight(weight, Scheme(bits=8, method=method)) for method in ("plain", "hqq"))
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme}, {scheme.method}")
def test_zero_rows_and_groups_stay_zero(scheme: Scheme) -> None:
    weight = heavy_tailed(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    quantized = quantize_weight(weight, scheme)
    assert not quantized.codes[1].any() and not quantized.codes[2, :64].any()
    assert (quantized.scales > 0).all() and torch.isfinite(quantized.scales).all()


def test_values_that_hqq_finds_no_scale_for() -> None:
    weight = torch.full((2, 64), 3e38)
    quantize_weight(weight, Scheme(bits=4, group_size=32))
    with pytest.raises(RecipeError, match="hqq") as caught:
        quantize_weight(weight, Scheme(bits=4, group_size=32, method="hqq"))
    assert caught.value.hint


def test_a_factor_changes_scales_and_no_code() -> None:
    """The trap of ExecuTorch's weight cache: B and 2·B have equal codes."""
    weight = heavy_tailed(8, 64)
    one, two = (quantize_weight(factor * weight, Scheme(bits=8)) for factor in (1, 2))
    assert torch.equal(one.codes, two.codes) and torch.equal(2 * one.scales, two.scales)


def torchao_rows(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        torch.from_numpy(weight.copy()), (1, weight.shape[1]), torch.int8
    )
    assert not quantized.zero_point.any()
    return quantized.qdata.numpy(), quantized.scale.reshape(-1, 1).numpy()


def equals_torchao(weight: NDArray[np.float32]) -> None:
    codes, scales = quantize_rows(weight)
    expected_codes, expected_scales = torchao_rows(weight)
    assert codes.dtype == np.int8 and scales.dtype == np.float32
    np.testing.assert_array_equal(scales.view(np.uint32), expected_scales.view(np.uint32))
    np.testing.assert_array_equal(codes, expected_codes)


MATRICES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 12)),  # torchao refuses a single column
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(max_examples=300, deadline=None)
@given(MATRICES)
def test_rows_in_numpy_equal_torchao_bit_for_bit(weight: NDArray[np.float32]) -> None:
    equals_torchao(weight)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-30, 1e-3, 1.0, 1e30, 1e37])
def test_rows_of_any_size_equal_torchao_bit_for_bit(rows: int, scale: float) -> None:
    generator = np.random.default_rng(rows)
    equals_torchao((generator.standard_normal((rows, 96)) * scale).astype(np.float32))


def test_rows_of_zeros_ties_and_extremes_equal_torchao_bit_for_bit() -> None:
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    rows = [
        [0.0, -0.0, 0.0, 0.0],
        [127.5, 0.5, 1.5, -0.5],
        [-127.5, 126.5, -127.0, 2.5],
        [largest, -largest, 1.0, 0.0],
        [tiny, -tiny, 0.0, 3 * tiny],
        [1.0, tiny, -1.0, 1e-30],
    ]
    equals_torchao(np.array(rows, np.float32))


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one.method == "plain"], ids=str)
def test_plain_scales_equal_torchao_bit_for_bit(scheme: Scheme, scale: float) -> None:
    weight = heavy_tailed(24, 128) * scale
    weight[3] = 0
    kind = torch.int4 if scheme.bits == 4 else torch.int8  # type: ignore[attr-defined]
    block, given = (1, scheme.group_size or 128), {}
    expected = IntxUnpackedToInt8Tensor.from_hp(weight, block, kind)
    if scheme.group_size is not None:  # the codes are those of the rounded scale
        rounded = expected.scale.to(torch.bfloat16).float()
        given = {"custom_scale": rounded, "custom_zero_point": torch.zeros_like(rounded, dtype=torch.int8)}
        expected = IntxUnpackedToInt8Tensor.from_hp(
            weight, block, kind, intx_choose_qparams_algorithm=None, **given
        )
    quantized = quantize_weight(weight, scheme)
    assert torch.equal(quantized.codes, expected.qdata)
    assert torch.equal(quantized.scales, expected.scale.reshape(24, -1))


def test_what_quantizes_imports_neither_torchao_nor_the_compiler_of_torch() -> None:
    """Each takes longer to import than torch."""
    script = """
import sys
from small_spec import SPEC
from bedplate.model.checkpoint import expected_model
from bedplate.quantize.correction import quantize_corrected
from bedplate.quantize.plan import plan
from bedplate.quantize.recipe import make_recipe
recipe = make_recipe("8da4w")
plan(expected_model(SPEC, recipe.corrections(SPEC)), recipe)
print({"torchao", "torch._dynamo"} & sys.modules.keys())
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "set()\n"


def test_a_single_column() -> None:
    """B of a rank-1 adapter: each row is its scale."""
    weight = np.array([[0.5], [-3.0], [0.0]], np.float32)
    codes, scales = quantize_rows(weight)
    assert codes.tolist() == [[127], [-128], [0]]
    np.testing.assert_array_equal(scales[:2], np.abs(weight[:2]) / np.float32(127.5))


def test_a_matrix_of_one_column_has_a_scale_for_each_row() -> None:
    """The offsets of a whole row are such a matrix."""
    weight = torch.tensor([[0.5], [-2.0], [0.0], [3e-3]])
    quantized = quantize_weight(weight, WEIGHT_ONLY)
    codes, scales = quantize_rows(weight.numpy())
    assert quantized.codes.tolist() == codes.tolist() and quantized.scales.tolist() == scales.tolist()
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=1 / 250, atol=0)
