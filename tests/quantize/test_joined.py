"""Constants of linears that are computed together, made of the constants of each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bedplate.constants import Constant
from bedplate.names import DIAGONAL, ROWS, Way, joined_name, kin, parts_of
from bedplate.quantize.joined import join, joined
from bedplate.quantize.packing import pack_float, pack_linear

NAMES = [f"layers.3.self_attn.{one}_proj" for one in "qkv"]
RNG = np.random.default_rng(0)


def four_bits(name: str, rows: int, columns: int = 64) -> list[Constant]:
    codes = RNG.integers(-8, 8, (rows, columns), dtype=np.int8)
    scales = np.ones((rows, columns // 32), np.float32) * np.float32(2.0 ** -RNG.integers(1, 9))
    return pack_linear(name, codes, scales, bits=4, group_size=32)


def eight_bits(name: str, rows: int, columns: int = 16) -> list[Constant]:
    codes = RNG.integers(-128, 128, (rows, columns), dtype=np.int8)
    scales = RNG.uniform(0.1, 1, (rows, 1)).astype(np.float32)
    return pack_linear(name, codes, scales, bits=8, group_size=columns, weight_only=True)


def floats(name: str, rows: int, columns: int = 16) -> list[Constant]:
    return pack_float(name, RNG.standard_normal((rows, columns), dtype=np.float32), is_tensor=False)


def matrix(constant: Constant) -> np.ndarray:
    dtype = np.float32 if constant.dtype == "float32" else np.int8
    return constant.data.view(dtype).reshape(constant.shape).astype(np.float64)


@given(
    linears=st.lists(st.sampled_from("qkv"), min_size=2, max_size=3, unique=True),
    way=st.sampled_from([ROWS, DIAGONAL]),
    rest=st.sampled_from(["weight#codes", "lora_a.weight", "bias"]),
)
def test_a_joined_name_tells_its_parts(linears: list[str], way: Way, rest: str) -> None:
    names = [f"layers.12.self_attn.{one}_proj.{rest}" for one in linears]
    name = joined_name(names, way)
    assert name.startswith("layers.12.") and name.endswith(rest)
    assert parts_of(name) == tuple(names)
    assert {kin(one) for one in names} == {f"layers.12.self_attn.*.{rest}"}


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "rope.rotation", "lm_head.weight", "q_proj"])
def test_other_constants_stay_alone(name: str) -> None:
    assert parts_of(name) == (name,)
    assert kin(name) is None


@pytest.mark.parametrize("pack", [four_bits, eight_bits, floats])
def test_rows_stand_one_below_the_other(pack: Callable[..., list[Constant]]) -> None:
    packed = [pack(f"{name}.weight", rows) for name, rows in zip(NAMES, (8, 4, 6), strict=True)]
    for parts in zip(*packed, strict=True):
        whole = join(joined_name([part.name for part in parts], ROWS), parts)
        assert whole.data.tobytes() == b"".join(part.data.tobytes() for part in parts)
        assert whole.shape == (18, *parts[0].shape[1:]) and whole.dtype == parts[0].dtype


@pytest.mark.parametrize("pack", [eight_bits, floats])
def test_blocks_on_the_diagonal_take_each_its_own_input(pack: Callable[..., list[Constant]]) -> None:
    shapes = [(8, 16), (4, 5), (6, 3)]
    packed = [pack(f"{n}.lora_b.weight", *shape) for n, shape in zip(NAMES, shapes, strict=True)]
    inputs = [RNG.standard_normal(columns) for _, columns in shapes]
    whole, *scales = [
        join(joined_name([part.name for part in parts], DIAGONAL), parts)
        for parts in zip(*packed, strict=True)
    ]
    assert whole.shape == (18, 24)
    apart = np.concatenate([matrix(of[0]) @ x for of, x in zip(packed, inputs, strict=True)])
    np.testing.assert_allclose(matrix(whole) @ np.concatenate(inputs), apart, rtol=1e-12)
    for scale in scales:
        assert scale.data.tobytes() == b"".join(of[1].data.tobytes() for of in packed)


def test_equal_codes_of_other_scales_have_another_key() -> None:
    codes = RNG.integers(-128, 128, (4, 16), dtype=np.int8)
    keys = set()
    for factor in (1, 2):
        scales = np.full((4, 1), factor, np.float32)
        parts = [pack_linear(f"{n}.lora_b.weight", codes, scales, bits=8, group_size=16)[0] for n in NAMES]
        keys |= {join(joined_name([part.name for part in parts], way), parts).key for way in (ROWS, DIAGONAL)}
    assert len(keys) == 4


def test_a_stream_is_joined_as_its_parts_come_by() -> None:
    q, k, v = (floats(f"{name}.weight", 4)[0] for name in NAMES)
    other = floats("layers.3.mlp.up_proj.weight", 4)[0]
    wanted = [joined_name([one.name for one in (q, k, v)], ROWS), other.name]
    found = list(joined([v, other, q, k], wanted))
    assert [constant.name for constant in found] == [other.name, wanted[0]]
    assert found[1].data.tobytes() == b"".join(one.data.tobytes() for one in (q, k, v))
    assert list(joined([q, k, v], [q.name])) == [q, k, v]
    with pytest.raises(AssertionError, match="parts are missing"):
        list(joined([q, k], wanted))


def test_more_than_three_are_not_joined() -> None:
    """A name from a stranger could have a million parts, each as long as the rest of it."""
    name = "layers.0.self_attn.q_proj+k_proj+v_proj+q_proj.weight"
    assert parts_of(name) == (name,)
