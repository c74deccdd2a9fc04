"""Offsets and recovery: what four bits lose, and what a narrow correction gives back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_spec import SPEC
from torch import Tensor

from bedplate.quantize import correction
from bedplate.quantize.correction import Corrected, quantize_corrected
from bedplate.quantize.recipe import EIGHT_BIT, Scheme, make_recipe
from bedplate.quantize.weights import quantize_with_offsets

OFFSET = Scheme(bits=4, group_size=32, method="offset")
PLAIN = Scheme(bits=4, group_size=32, method="plain")


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spread(offsets: Tensor, columns: int) -> Tensor:
    return offsets.repeat_interleave(columns // offsets.shape[1], dim=1)


def result(corrected: Corrected, name: str) -> Tensor:
    """The matrix that the linear and its correction compute together."""
    low_rank = corrected.backs[name].dequantize() @ corrected.directions.dequantize()
    return corrected.weights[name].dequantize() + low_rank


def seen_error(weight: Tensor, corrected: Corrected, name: str, rms: Tensor) -> float:
    return float(((weight - result(corrected, name)) * rms).square().mean().sqrt())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.floats(1e-4, 1e3))
def test_weights_that_were_four_bits_with_offsets_are_found_again(
    seed: int, rows: int, groups: int, size: float
) -> None:
    """As GGUF's Q4_1 stores them: d · q + m with q of 0 … 15, both ends taken."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, groups, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    step = (torch.rand(rows, groups, 1, generator=generator) + 0.5) * size
    weight = (codes * step + torch.randn(rows, groups, 1, generator=generator) * size).view(rows, -1)
    quantized, offsets = quantize_with_offsets(weight, 32)
    # A bfloat16 scale is off by at most 2^-8 of itself, a code by that many times its distance from the code whose
    # value the offset makes exact: at most 15. 1.01: float32 sums.
    off = (weight - quantized.dequantize() - spread(offsets, weight.shape[1])).abs().view(rows, groups, 32)
    assert (off <= step * 15 * 2**-8 * 1.01).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([32, 64, 96]))
def test_offsets_are_no_worse_than_the_full_range(seed: int, group_size: int) -> None:
    weight = matrix(5, 192, seed)
    quantized, offsets = quantize_with_offsets(weight, group_size)
    error = (weight - quantized.dequantize() - spread(offsets, 192)).view(5, -1, group_size)
    groups = weight.view(5, -1, group_size)
    step = (groups.amax(-1) - groups.amin(-1)) / 15 * 1.01  # 1.01: scales are rounded to bfloat16
    assert (error.square().mean(-1) <= (step / 2).square()).all()


def test_groups_of_one_value() -> None:
    quantized, offsets = quantize_with_offsets(torch.full((2, 64), 0.375), 32)
    assert torch.isfinite(offsets).all()
    assert torch.equal(quantized.dequantize() + spread(offsets, 64), torch.full((2, 64), 0.375))


def test_values_whose_squares_are_beyond_float32() -> None:
    weight = matrix(2, 64, 0) * 1e30
    quantized, offsets = quantize_with_offsets(weight, 32)
    assert (quantized.scales > 0).all()
    error = (quantized.dequantize() + spread(offsets, 64) - weight).abs()
    assert (error <= 0.6 * quantized.scales.repeat_interleave(32, dim=1)).all()


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight = matrix(64, 64, 0)
    importance = torch.where(torch.arange(64) % 2 == 0, 1e-4, 1.0)

    def error(given: Tensor | None) -> float:
        quantized, offsets = quantize_with_offsets(weight, 32, given)
        left = weight - quantized.dequantize() - spread(offsets, 64)
        return float((left.square() * importance).sum())

    assert error(importance) < 0.9 * error(None)


@pytest.mark.parametrize("scheme", [OFFSET, PLAIN], ids=["offset", "plain"])
def test_more_directions_leave_less(scheme: Scheme) -> None:
    weights = {"a": matrix(64, 96, 1), "b": matrix(32, 96, 2)}
    rms = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    groups = 3 if scheme is OFFSET else 0
    errors = []
    for rank in (0, 8, 32):
        schemes = dict.fromkeys(weights, scheme)
        if groups + rank == 0:
            continue
        corrected = quantize_corrected(weights, schemes, rank=groups + rank, rms=rms)
        assert corrected.directions.codes.shape == (groups + rank, 96)
        errors.append([seen_error(weights[name], corrected, name, rms) for name in weights])
    for more, less in itertools.pairwise(errors):
        assert all(after < before for before, after in zip(more, less, strict=True))
    assert errors[-1][0] < 0.75 * errors[0][0]


@pytest.mark.parametrize("scheme", [OFFSET, PLAIN], ids=["offset", "plain"])
def test_quantizing_what_the_directions_leave_leaves_less(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": matrix(64, 96, 8) + 3 * matrix(64, 4, 9) @ matrix(4, 96, 10)}
    rms = torch.rand(96, generator=torch.Generator().manual_seed(11)) + 0.1
    alternated = quantize_corrected(weights, {"a": scheme}, rank=16, rms=rms)
    monkeypatch.setattr(correction, "_ROUNDS", 1)
    once = quantize_corrected(weights, {"a": scheme}, rank=16, rms=rms)
    assert seen_error(weights["a"], alternated, "a", rms) < 0.97 * seen_error(weights["a"], once, "a", rms)


def test_directions_follow_what_the_activations_see() -> None:
    """A correction for inputs that live in some columns corrects those."""
    weight, rms = matrix(64, 96, 4), torch.where(torch.arange(96) < 32, 1.0, 0.01)
    schemes = {"a": PLAIN}
    seeing = quantize_corrected({"a": weight}, schemes, rank=8, rms=rms)
    blind = quantize_corrected({"a": weight}, schemes, rank=8, rms=torch.ones(96))
    assert seen_error(weight, seeing, "a", rms) < 0.9 * seen_error(weight, blind, "a", rms)


def test_what_has_not_four_bits_is_left_alone() -> None:
    weights = {"a": matrix(32, 64, 5), "b": matrix(32, 64, 6)}
    corrected = quantize_corrected(weights, {"a": OFFSET, "b": EIGHT_BIT}, rank=2, rms=None)
    assert not corrected.backs["b"].codes.any() and corrected.weights["b"].bits == 8
    assert (result(corrected, "b") - weights["b"]).abs().max() < weights["b"].abs().max() / 200


def test_the_same_input_gives_the_same_bits() -> None:
    weights, rms = {"a": matrix(64, 96, 7)}, torch.ones(96)
    one, other = (quantize_corrected(weights, {"a": OFFSET}, rank=11, rms=rms) for _ in range(2))
    assert torch.equal(one.directions.codes, other.directions.codes)
    assert torch.equal(one.backs["a"].codes, other.backs["a"].codes)
    assert torch.equal(one.backs["a"].scales, other.backs["a"].scales)


def test_ranks_of_a_recipe() -> None:
    recipe = make_recipe("8da4w", method="offset", recovery_rank=4, overrides={"*.k_proj": "8da8w"})
    assert recipe.corrections(SPEC) == {
        "self_attn.q_proj": 2 + 4,
        "self_attn.v_proj": 2 + 4,
        "self_attn.o_proj": 4 + 4,
        "mlp.gate_proj": 2 + 4,
        "mlp.up_proj": 2 + 4,
        "mlp.down_proj": 3 + 4,
    }
    assert make_recipe("8da4w", method="hqq").corrections(SPEC) == {}
    assert make_recipe("8da8w", method="offset", recovery_rank=4).corrections(SPEC) == {}
