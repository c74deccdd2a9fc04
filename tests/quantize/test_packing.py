"""Constants: the bytes that ExecuTorch reads, under keys that name all that decides the packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from small_spec import SPEC
from torch import nn

from bedplate.constants import Constant
from bedplate.quantize.foundation import fixed_constants, pack_tensor
from bedplate.quantize.modules import QuantizedEmbedding, QuantizedLinear
from bedplate.quantize.packing import pack_embedding, pack_float, pack_linear, pack_nibbles
from bedplate.quantize.recipe import EIGHT_BIT, FLOAT, Scheme
from bedplate.quantize.rows import pack_branch, quantize_rows
from bedplate.quantize.weights import quantize_weight

NIBBLES = hnp.arrays(
    np.int8,
    st.tuples(st.integers(1, 5), st.integers(1, 6).map(lambda half: 2 * half)),
    elements=st.integers(-8, 7),
)
GROUPS = Scheme(bits=4, group_size=32)


def weight(rows: int = 8, columns: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns)


def keys(constants: list[Constant]) -> list[str]:
    return [constant.key for constant in constants]


@given(NIBBLES, st.booleans())
def test_nibbles_hold_every_code(codes: NDArray[np.int8], low_first: bool) -> None:
    packed = pack_nibbles(codes, low_first=low_first)
    assert packed.dtype == np.uint8 and packed.shape == (codes.shape[0], codes.shape[1] // 2)
    first, second = (packed & 15, packed >> 4) if low_first else (packed >> 4, packed & 15)
    unpacked = np.stack([first, second], axis=-1).reshape(codes.shape).astype(np.int16) - 8
    np.testing.assert_array_equal(unpacked, codes)


def test_the_rotation_keeps_its_bytes() -> None:
    """A zero of another sign computes the same, and would be another constant than in older bundles."""
    spec = replace(SPEC, head_dim=4)
    rotation = np.frombuffer(fixed_constants(spec, 1, 1)["rope.rotation"].data, np.float32).reshape(4, 4)
    expected = np.array([[0, 0, -1, -0.0], [0, 0, -0.0, -1], [1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    assert rotation.tobytes() == expected.tobytes()


def test_nibbles_literally() -> None:
    codes = np.array([[-8, 7, 0, 1]], np.int8)
    assert pack_nibbles(codes, low_first=True).tolist() == [[0xF0, 0x98]]
    assert pack_nibbles(codes, low_first=False).tolist() == [[0x0F, 0x89]]


def test_a_linear_of_groups() -> None:
    quantized = quantize_weight(weight(), GROUPS)
    codes, scales = pack_linear(
        "q.weight", quantized.codes.numpy(), quantized.scales.numpy(), bits=4, group_size=32
    )
    assert (codes.name, codes.dtype, codes.shape, codes.is_tensor) == (
        "q.weight#codes",
        "int4",
        (8, 64),
        False,
    )
    assert (scales.name, scales.dtype, scales.shape) == ("q.weight#scales", "bfloat16", (8, 2))
    assert (codes.nbytes, scales.nbytes) == (8 * 64 // 2, 8 * 2 * 2)
    stored = torch.frombuffer(bytearray(scales.data), dtype=torch.bfloat16).float().view(8, 2)
    assert torch.equal(stored, quantized.scales)


def test_a_linear_of_rows() -> None:
    quantized = quantize_weight(weight(), EIGHT_BIT)
    codes, scales = pack_linear(
        "q.weight", quantized.codes.numpy(), quantized.scales.numpy(), bits=8, group_size=64
    )
    assert (codes.dtype, codes.shape, codes.nbytes) == ("int8", (8, 64), 8 * 64)
    assert scales.dtype == "float32"
    np.testing.assert_array_equal(codes.data.view(np.int8).reshape(8, 64), quantized.codes.numpy())
    np.testing.assert_array_equal(scales.data.view(np.float32), quantized.scales.numpy()[:, 0])


def test_scales_that_bfloat16_does_not_hold_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="rounded to bfloat16"):
        pack_linear(
            "q", np.zeros((1, 64), np.int8), np.array([[0.1, 0.2]], np.float32), bits=4, group_size=32
        )


@pytest.mark.parametrize(("bits", "dtype", "nbytes"), [(4, "uint8", 8 * 32), (8, "int8", 8 * 64)])
def test_an_embedding_is_a_tensor_of_the_program(bits: int, dtype: str, nbytes: int) -> None:
    quantized = quantize_weight(weight(), GROUPS if bits == 4 else EIGHT_BIT)
    table, scales = pack_embedding("embed", quantized.codes.numpy(), quantized.scales.numpy(), bits=bits)
    assert table.is_tensor and scales.is_tensor and (table.dtype, table.nbytes) == (dtype, nbytes)
    assert table.shape == ((8, 32) if bits == 4 else (8, 64)) and scales.shape == (
        (8, 2) if bits == 4 else (8,)
    )


@pytest.mark.parametrize("scheme", [GROUPS, EIGHT_BIT, Scheme(bits=4)], ids=str)
def test_the_key_of_codes_covers_their_scales(scheme: Scheme) -> None:
    """XNNPACK's cache finds packed weights by the key of the codes alone, and B and 2·B have equal codes."""
    one, two = (quantize_weight(factor * weight(), scheme) for factor in (1, 2))
    assert torch.equal(one.codes, two.codes)
    first, second = (
        pack_linear("b", w.codes.numpy(), w.scales.numpy(), bits=w.bits, group_size=w.group_size)
        for w in (one, two)
    )
    assert np.array_equal(first[0].data, second[0].data) and first[0].key != second[0].key
    assert first[1].key != second[1].key


def test_an_adapter_and_twice_the_adapter_have_no_key_in_common() -> None:
    value = weight(16, 4).numpy()
    one, two = (pack_branch("b", np.float32(factor) * value, "8w") for factor in (1, 2))
    assert np.array_equal(one[0].data, two[0].data)
    assert not set(keys(one)) & set(keys(two))


def test_group_size_is_part_of_the_key() -> None:
    codes = np.zeros((4, 128), np.int8)
    found = {
        pack_linear("q", codes, np.ones((4, 128 // size), np.float32), bits=4, group_size=size)[0].key
        for size in (32, 64, 128)
    }
    assert len(found) == 3


def test_equal_bytes_as_codes_and_as_a_dense_weight_have_different_keys() -> None:
    codes = np.arange(64, dtype=np.int8).reshape(1, 64)
    dense = codes.view(np.float32)
    packed = pack_linear("q", codes, np.ones((1, 1), np.float32), bits=8, group_size=64)[0]
    float_keys = {pack_float("q", dense, is_tensor=is_tensor)[0].key for is_tensor in (False, True)}
    assert np.array_equal(packed.data, pack_float("q", dense, is_tensor=False)[0].data)
    assert len({packed.key, *float_keys}) == 3


def test_the_name_is_no_part_of_the_key() -> None:
    value = weight().numpy()
    assert keys(pack_float("one", value, is_tensor=True)) == keys(
        pack_float("two", value.copy(), is_tensor=True)
    )


def test_views_and_copies_have_one_key() -> None:
    value = weight(8, 64).numpy()
    transposed = np.ascontiguousarray(value.T).T
    assert not transposed.flags.c_contiguous
    one, two = (pack_float("w", v, is_tensor=False)[0] for v in (value, transposed))
    assert one.key == two.key and np.array_equal(one.data, two.data)


def test_a_branch_in_float_or_8_bits() -> None:
    value = weight(16, 4).numpy()
    (dense,) = pack_branch("layers.0.q.lora_b.weight", value, "none")
    assert (dense.name, dense.dtype, dense.shape) == ("layers.0.q.lora_b.weight", "float32", (16, 4))
    np.testing.assert_array_equal(dense.data.view(np.float32).reshape(16, 4), value)
    codes, scales = pack_branch("layers.0.q.lora_b.weight", value, "8w")
    expected_codes, expected_scales = quantize_rows(value)
    np.testing.assert_array_equal(codes.data.view(np.int8).reshape(16, 4), expected_codes)
    np.testing.assert_array_equal(scales.data.view(np.float32), expected_scales[:, 0])


OF_LINEARS = [
    ("layers.0.mlp.up_proj.weight", GROUPS, {"#codes": "int4", "#scales": "bfloat16"}),
    ("layers.0.mlp.up_proj.weight", EIGHT_BIT, {"#codes": "int8", "#scales": "float32"}),
    ("layers.0.mlp.up_proj.weight", FLOAT, {"": "float32"}),
    ("layers.0.mlp.up_proj.bias", GROUPS, {"": "float32"}),
]
OF_OTHERS = [
    ("embed_tokens.weight", EIGHT_BIT, {"#codes": "int8", "#scales": "float32"}),
    ("embed_tokens.weight", FLOAT, {"": "float32"}),
    ("layers.0.attention_norm.weight", None, {"": "float32"}),
]


@pytest.mark.parametrize(
    ("below", "name", "scheme", "parts"),
    # A linear beside a LoRA branch has its scheme under `….linear`.
    [*(("", *case) for case in OF_LINEARS + OF_OTHERS), *((".linear", *case) for case in OF_LINEARS)],
)
def test_a_parameter_by_the_scheme_of_its_module(
    below: str, name: str, scheme: Scheme | None, parts: dict[str, str]
) -> None:
    path = name.rpartition(".")[0]
    value = weight() if "weight" in name and scheme is not None else weight()[0]
    schemes = {} if scheme is None else {path + below: scheme}
    constants = list(pack_tensor([name], value.to(torch.bfloat16), schemes))
    found = {constant.name.removeprefix(path): constant.dtype for constant in constants}
    leaf = name.removeprefix(path)
    # With codes, the lengths of a linear's rows are kept.
    norms = {".row_norms": "float32"} if "up_proj" in name and "#codes" in parts else {}
    assert found == {leaf + part: dtype for part, dtype in parts.items()} | norms
    in_program = "embed_tokens" in name or "norm" in name
    assert all(constant.is_tensor == in_program for constant in constants)


@pytest.mark.parametrize(
    "scheme", [GROUPS, EIGHT_BIT, Scheme(bits=4), Scheme(bits=4, group_size=64)], ids=str
)
def test_a_quantized_linear_computes_with_the_dequantized_weight(scheme: Scheme) -> None:
    value = weight()
    quantized = quantize_weight(value, scheme)
    module = QuantizedLinear(quantized, torch.ones(8))
    torch.testing.assert_close(module.dequantized_weight(), quantized.dequantize(), rtol=0, atol=0)
    x = torch.randn(1, 5, 64)
    expected = nn.functional.linear(x, quantized.dequantize(), torch.ones(8))
    # Each input is off by at most half of one of 255 steps of its row's range.
    step = (x.amax(dim=2).clamp(min=0) - x.amin(dim=2).clamp(max=0)) / 255
    bound = 0.51 * step[..., None] * quantized.dequantize().abs().sum(dim=1)
    assert ((module(x) - expected).abs() <= bound).all()
    assert not torch.equal(module(x), expected)


@pytest.mark.parametrize("scheme", [GROUPS, EIGHT_BIT], ids=str)
def test_a_quantized_embedding_looks_up_the_dequantized_row(scheme: Scheme) -> None:
    quantized = quantize_weight(weight(), scheme)
    found = QuantizedEmbedding(quantized)(torch.tensor([[0, 7, 3, 3]]))
    torch.testing.assert_close(found, quantized.dequantize()[[0, 7, 3, 3]][None], rtol=0, atol=0)


class OfRows:
    """A matrix that gives nothing but some rows at a time."""

    def __init__(self, values: torch.Tensor) -> None:
        self.shape = values.shape
        self._values = values

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._values[rows].clone()


@pytest.mark.parametrize("scheme", [FLOAT, EIGHT_BIT, GROUPS])
def test_rows_at_a_time_make_the_same_constants(scheme: Scheme) -> None:
    values = weight(5000, 64).to(torch.bfloat16)  # several blocks
    schemes = {"embed_tokens": EIGHT_BIT, "lm_head": scheme}
    names = [f"{path}.weight" for path in schemes]
    whole, by_rows = (list(pack_tensor(names, one, schemes)) for one in (values, OfRows(values)))
    assert keys(by_rows) == keys(whole)
