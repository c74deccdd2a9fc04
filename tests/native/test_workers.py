"""The threads that programs run on: awake while a step runs, asleep else, and never more than were asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bedplate import _native
from bedplate.bundle.store import Bundle

TOKENS = np.arange(1, 9, dtype=np.int64)


def os_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def base(toy_bundle: Bundle) -> Iterator[_native.Program]:
    threads = _native.threads()
    program = _native.Program(
        str(toy_bundle.base_program), [str(toy_bundle.foundation)], _native.Activations(), True
    )
    program.load("forward")
    yield program
    _native.set_threads(threads)


def steps(program: _native.Program, count: int) -> bytes:
    """The logits of a prompt and of `count` tokens after it."""
    kv = _native.KvCache(program.kv_bytes("forward"))
    logits = [program.step("forward", TOKENS, 0, kv)]
    logits += [program.step("forward", TOKENS[:1], len(TOKENS) + i, kv) for i in range(count)]
    return np.stack(logits).tobytes()


def test_any_number_of_threads_gives_the_same_bits(base: _native.Program) -> None:
    _native.set_threads(1)
    alone = steps(base, 20)
    for count in (2, 5, 3, 2, 1, 4):  # more than there are cores, too
        _native.set_threads(count)
        assert _native.threads() == count
        assert steps(base, 20) == alone, f"{count} threads"


def test_threads_are_kept_and_no_more_are_made(base: _native.Program) -> None:
    _native.set_threads(4)
    steps(base, 1)
    before = os_threads()
    for count in (2, 3, 1, 4) * 3:
        _native.set_threads(count)
        steps(base, 1)
    assert os_threads() == before


def test_no_thread_computes_between_steps(base: _native.Program) -> None:
    _native.set_threads(3)
    steps(base, 5)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.15  # one that stayed awake would use the whole 0.3 s
