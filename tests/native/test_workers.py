"""The threads that programs run on: awake while a step runs, asleep else, and as many as were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bedplate import _native
from bedplate.bundle.store import Bundle

TOKENS = list(range(1, 9))


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
    logits = [program.step("forward", TOKENS, 0, kv).array]
    logits += [program.step("forward", TOKENS[:1], len(TOKENS) + i, kv).array for i in range(count)]
    return np.stack(logits).tobytes()


def test_loaded_programs_run_on_any_number_of_threads_to_the_same_bits(base: _native.Program) -> None:
    _native.set_threads(1)
    alone = steps(base, 20)
    for count in (2, 1, 2, 2, 1):
        _native.set_threads(count)
        assert _native.threads() == count
        assert steps(base, 20) == alone, f"{count} threads"


def test_threads_are_kept_and_no_more_are_made(base: _native.Program) -> None:
    _native.set_threads(2)
    steps(base, 1)
    before = os_threads()
    for count in (1, 2) * 5:
        _native.set_threads(count)
        steps(base, 1)
    assert os_threads() <= before


def test_no_thread_computes_between_steps(base: _native.Program) -> None:
    _native.set_threads(2)
    steps(base, 5)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.15  # one that stayed awake would use the whole 0.3 s


MORE_THAN_CORES = """
import os, sys, numpy as np
from bedplate import Bundle, Engine, _native
from bedplate.errors import RunError
bundle, cores = Bundle.open(sys.argv[1]), len(os.sched_getaffinity(0))
many = Engine(bundle, threads=cores + 3)
logits = many.session().step([1, 2, 3])
assert _native.threads() == cores + 3
np.testing.assert_array_equal(Engine(bundle, threads=1).session().step([1, 2, 3]), logits)
assert len(os.listdir("/proc/self/task")) >= cores + 3
draw = np.random.default_rng(0).standard_normal
for positions, start_pos in ((1, 700), (60, 0)):
    q, k, v = (draw((1, n, 3, 64), np.float32) for n in (positions, *[positions + start_pos] * 2))
    results = set()
    for count in range(1, cores + 4):
        _native.set_threads(count)
        results.add(_native.attention(q, k, v, start_pos).tobytes())
    assert len(results) == 1
try:
    Engine(bundle, threads=cores + 4)
except RunError as error:
    print(error)
"""


def test_the_first_engine_decides_how_many_there_can_be(toy_bundle: Bundle) -> None:
    words = [sys.executable, "-c", MORE_THAN_CORES, str(toy_bundle.path)]
    done = subprocess.run(words, capture_output=True, text=True)
    cores = len(os.sched_getaffinity(0))
    assert done.returncode == 0, done.stderr
    assert f"this process has {cores + 3} threads, not {cores + 4}" in done.stdout
    assert "hint: the first engine" in done.stdout
