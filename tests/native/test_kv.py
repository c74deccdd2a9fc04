"""Keys and values in blocks that sessions share: what is shared is computed once, and each writes only its own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import EIGHT, FOUR, Random, run

from bedplate import _native
from bedplate._native import NativeError

# Of three blocks and a part.
TEXT = [int(token) for token in np.random.default_rng(0).integers(0, 50, 200)]
BLOCK = 64


@functools.cache
def decoder() -> _native.Decoder:
    return Random(7).model(kind=FOUR, kinds={"head": EIGHT}).decoder(2, meter=meter())


@functools.cache
def meter() -> _native.Meter:
    return _native.Meter()


@functools.cache
def expected(half: bool, tokens: tuple[int, ...] = tuple(TEXT)) -> Any:
    return run(decoder(), tokens, half=half, chunk=1)


def step(kv: _native.Kv, tokens: list[int], first: int) -> Any:
    rows = [(token, first + i, kv, None, 1.0, True) for i, token in enumerate(tokens)]
    return decoder().step(rows).array


def filled(half: bool = True, count: int = len(TEXT)) -> _native.Kv:
    kv = decoder().kv(half=half)
    step(kv, TEXT[:count], 0)
    assert kv.positions == count
    return kv


@pytest.mark.parametrize("half", [True, False])
class TestAFork:
    @pytest.mark.parametrize("at", [0, 1, 16, 37, 63, 64, 65, 128, 190, 200])
    def test_and_its_origin_go_on_as_if_alone(self, half: bool, at: int) -> None:
        kv = filled(half)
        fork = kv.fork(at)
        assert fork.positions == at
        other = [*TEXT[:at], 3, 1, 4, 1, 5, 9]
        np.testing.assert_array_equal(step(fork, other[at:], at), expected(half, tuple(other))[at:])
        # And the origin, which goes back to where they part.
        if at < len(TEXT):
            np.testing.assert_array_equal(step(kv, TEXT[at:], at), expected(half)[at:])
        np.testing.assert_array_equal(step(fork, [7], at + 6), expected(half, (*other, 7))[-1:])

    def test_takes_memory_for_what_differs(self, half: bool) -> None:
        before = meter().nbytes
        kv = filled(half)
        block = kv.block_nbytes
        assert meter().nbytes - before == kv.nbytes == 4 * block
        forks = [kv.fork(150) for _ in range(5)]
        assert meter().nbytes - before == 4 * block and forks[0].nbytes == 3 * block
        assert [forks[0].growth(150, end) for end in (150, 151, 192, 193)] == [block, block, block, 2 * block]
        step(forks[0], [1], 150)
        assert meter().nbytes - before == 5 * block
        assert forks[0].growth(151, 192) == 0
        del forks, kv
        assert meter().nbytes == before

    def test_that_outlives_its_origin_writes_in_place(self, half: bool) -> None:
        before = meter().nbytes
        kv = filled(half, 70)
        fork = kv.fork(70)
        del kv
        assert fork.growth(70, 71) == 0
        np.testing.assert_array_equal(step(fork, TEXT[70:], 70), expected(half)[70:])
        assert meter().nbytes - before == fork.nbytes

    def test_two_that_write_to_one_block_in_one_step(self, half: bool) -> None:
        kv = filled(half, 100)
        forks = [kv.fork(100), kv.fork(90), kv]
        texts = [[*TEXT[:100], 5], [*TEXT[:90], 6], [*TEXT[:100], 7]]
        rows = [
            (text[-1], len(text) - 1, fork, None, 1.0, True) for fork, text in zip(forks, texts, strict=True)
        ]
        got = decoder().step(rows).array
        for row, text in zip(got, texts, strict=True):
            np.testing.assert_array_equal(row, expected(half, tuple(text))[-1])

    def test_a_block_that_goes_by_its_bytes(self, half: bool) -> None:
        """Also of one that is not full, beyond which are zeros."""
        kv = filled(half, 150)
        blocks = [kv.block(i) for i in range(3)]
        other = decoder().kv(half=half)
        for block, end in zip(blocks, (64, 128, 150), strict=True):
            other.write(end, block.data)
        assert other.positions == 150
        np.testing.assert_array_equal(step(other, TEXT[150:], 150), expected(half)[150:])
        step(kv, TEXT[150:192], 150)
        cut = kv.fork(150)
        assert [cut.block(i).data for i in range(3)] == [block.data for block in blocks]
        numbers = np.frombuffer(blocks[2].data, np.float16 if half else np.float32)
        assert np.count_nonzero(numbers == 0) >= numbers.size * (192 - 150) // 64

    def test_a_block_that_is_held_never_changes(self, half: bool) -> None:
        kv = filled(half)
        block = kv.block(1)
        data = block.data
        assert block.is_shared
        step(kv, [9] * 30, 70)
        assert block.data == data and not block.is_shared


def test_of_blocks_another_kv_is_made() -> None:
    kv = filled()
    blocks = [kv.block(0), kv.block(1)]
    other = decoder().kv(half=True, blocks=blocks, positions=128)
    before = meter().nbytes
    np.testing.assert_array_equal(step(other, TEXT[128:], 128), expected(True)[128:])
    assert meter().nbytes - before == 2 * kv.block_nbytes
    # What a block holds may count in part.
    other = decoder().kv(half=True, blocks=blocks, positions=127)
    np.testing.assert_array_equal(step(other, TEXT[127:], 127), expected(True)[127:])
    np.testing.assert_array_equal(step(kv, TEXT[128:], 128), expected(True)[128:])


def test_room_that_was_made_before() -> None:
    kv = filled(count=100)
    fork = kv.fork(100)
    growth = fork.growth(100, 200)
    assert growth == 3 * kv.block_nbytes
    before = meter().nbytes
    fork.reserve(100, 200)
    assert (meter().nbytes - before, fork.growth(100, 200), fork.positions) == (growth, 0, 100)
    np.testing.assert_array_equal(step(fork, TEXT[100:], 100), expected(True)[100:])
    assert meter().nbytes - before == growth


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda kv: kv.fork(101), "not so many positions"),
        (lambda kv: kv.fork(-1), "not so many positions"),
        (lambda kv: kv.fork(2**62), "not so many positions"),
        (lambda kv: kv.block(2), "no such block"),
        (lambda kv: kv.block(-1), "no such block"),
        (lambda kv: kv.block(2**62), "no such block"),
        (lambda kv: kv.growth(-1, 5), "out of bounds"),
        (lambda kv: kv.growth(6, 5), "out of bounds"),
        (lambda kv: kv.reserve(0, 2**62), "out of bounds"),
        (lambda kv: kv.write(100, b"1234"), "another size"),
        (lambda kv: kv.write(0, kv.block(0).data), "out of bounds"),
        (lambda kv: kv.write(2**62, kv.block(0).data), "out of bounds"),
        (lambda kv: decoder().kv(half=True, positions=1), "more positions than blocks"),
        (lambda kv: decoder().kv(half=True, positions=-1), "out of bounds"),
        (lambda kv: decoder().kv(half=True, positions=2**62), "out of bounds"),
        (lambda kv: decoder().kv(half=True, blocks=[kv.block(0)], positions=0), "or fewer"),
        (lambda kv: decoder().kv(half=True, blocks=[kv.block(0)], positions=65), "more positions than"),
        (lambda kv: decoder().kv(half=False, blocks=[kv.block(0)], positions=5), "another model or form"),
        (
            lambda kv: decoder().kv(half=True, of_long=True, blocks=[kv.block(0)], positions=5),
            "another model or form",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(call: Any, complaint: str) -> None:
    kv = filled(count=100)
    before = meter().nbytes
    with pytest.raises(NativeError, match=complaint):
        call(kv)
    assert meter().nbytes == before
    np.testing.assert_array_equal(step(kv, TEXT[100:], 100), expected(True)[100:])


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_a_tree_of_forks(data: st.DataObject) -> None:
    """Any of them steps, alone or with others; each is always as if it were alone."""
    kvs: list[tuple[_native.Kv, list[int]]] = [(decoder().kv(half=True), [])]
    alphabet = st.integers(0, 2)  # so that texts have long beginnings in common
    for _ in range(data.draw(st.integers(1, 12))):
        kv, tokens = data.draw(st.sampled_from(kvs))
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(tokens)))
            kvs.append((kv.fork(at), tokens[:at]))
        chosen = data.draw(st.lists(st.sampled_from(range(len(kvs))), min_size=1, max_size=3, unique=True))
        rows, wanted = [], []
        for i in chosen:
            kv, tokens = kvs[i]
            new = data.draw(st.lists(alphabet, min_size=1, max_size=70))[: 256 - len(tokens)]
            for token in new:
                tokens.append(token)
                rows.append((token, len(tokens) - 1, kv, None, 1.0, True))
                wanted.append((i, len(tokens) - 1))
        if rows:
            got = decoder().step(rows).array
            for i in chosen:
                whole = run(decoder(), kvs[i][1], half=True)
                for row, (owner, position) in zip(got, wanted, strict=True):
                    if owner == i:
                        assert row.tobytes() == whole[position].tobytes()
