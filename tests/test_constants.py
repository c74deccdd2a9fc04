"""Content keys: equal content, equal key; anything else, another."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bedplate.constants import KEY_LENGTH, TENSOR, Constant, content_key

DATA = np.arange(16, dtype=np.uint8)
KEY = content_key("int8", (4, 4), "row", DATA)


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def test_a_key_is_64_hex_characters() -> None:
    assert KEY_LENGTH == 64 and re.fullmatch("[0-9a-f]{64}", KEY)


def test_equal_content_has_an_equal_key() -> None:
    assert content_key("int8", [4, 4], "row", DATA.copy()) == KEY


@pytest.mark.parametrize(
    "other",
    [
        content_key("uint8", (4, 4), "row", DATA),
        content_key("int8", (2, 8), "row", DATA),
        content_key("int8", (16,), "row", DATA),
        content_key("int8", (4, 4), "group 2", DATA),
        content_key("int8", (4, 4), "row", DATA[::-1].copy()),
        content_key("int8", (4, 4), "row", DATA, DATA),
        content_key("int8", (4, 4), "row", DATA, DATA[:0]),
    ],
    ids=["dtype", "shape", "rank", "layout", "bytes", "scales", "empty scales"],
)
def test_the_same_bytes_as_something_else_have_another_key(other: str) -> None:
    assert other != KEY


PARTS = st.lists(st.binary(max_size=6), min_size=1, max_size=3)


@given(PARTS, PARTS)
def test_no_two_lists_of_parts_hash_alike(one: list[bytes], two: list[bytes]) -> None:
    assume(one != two)
    keys = {content_key("int8", (1,), "row", *(array(part) for part in parts)) for parts in (one, two)}
    assert len(keys) == 2


def test_a_key_literally() -> None:
    """Keys are in files: a change of them makes every bundle another."""
    header = b"int8|4,4|row"
    parts = (header, DATA.tobytes(), b"ab")
    blob = b"bedplate constant v1" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert content_key("int8", (4, 4), "row", DATA, array(b"ab")) == hashlib.sha256(blob).hexdigest()


def test_a_constant_knows_its_size() -> None:
    assert Constant.of("x", "int8", (4, 4), "row", DATA).nbytes == 16


def test_a_constant_has_the_key_of_its_content_and_of_its_scales() -> None:
    scales = Constant.of("x#scales", "float32", (4, 1), "scales", DATA)
    assert Constant.of("x", "int8", (4, 4), "row", DATA).key == KEY
    assert Constant.of("x", "int8", (4, 4), "row", DATA, scales).key == content_key(
        "int8", (4, 4), "row", DATA, DATA
    )


def test_a_tensor_of_the_program_is_told_by_its_layout() -> None:
    assert [Constant.of("x", "int8", (16,), layout, DATA).is_tensor for layout in (TENSOR, "row")] == [
        True,
        False,
    ]
