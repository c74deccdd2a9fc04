"""The threads that compute steps: awake while a step runs, asleep else, gone with their decoder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from os_threads import os_threads
from random_models import Random, run

TOKENS = list(range(1, 9))


def test_threads_are_those_asked_for_and_end_with_their_decoder() -> None:
    before, model = os_threads(), Random(0).model()
    for count in (1, 2, 5, 1):
        decoder = model.decoder(count)
        assert decoder.threads == count
        assert os_threads(before + count - 1) == before + count - 1
        run(decoder, TOKENS)
        assert os_threads(before + count - 1) == before + count - 1
        del decoder
        assert os_threads(before) == before


def test_a_decoder_may_go_before_its_first_step() -> None:
    model = Random(0).model()
    for _ in range(50):
        model.decoder(4)


def test_no_thread_computes_between_steps() -> None:
    decoder = Random(0).model().decoder(2)
    run(decoder, TOKENS, chunk=1)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.15  # one that stayed awake would use the whole 0.3 s


def test_threads_that_slept_compute_the_next_step() -> None:
    decoder = Random(0).model().decoder(3)
    expected = run(decoder, TOKENS)
    for pause in (0.0, 0.0001, 0.0002, 0.0003, 0.001, 0.05) * 5:
        time.sleep(pause)
        np.testing.assert_array_equal(run(decoder, TOKENS, chunk=4), expected)


def test_many_more_threads_than_cores() -> None:
    model = Random(0).model()
    np.testing.assert_array_equal(run(model.decoder(40), TOKENS), run(model.decoder(), TOKENS))


NO_MORE_THREADS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from random_models import Random, run
from bedplate import _native
model = Random(0).model()
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))  # stacks of 8 MB each
try:
    model.decoder(1024)
except _native.NativeError as error:
    print(error)
run(model.decoder(2), [1, 2, 3])
print("goes on")
"""


@pytest.mark.skipif(
    bool({"ASAN_OPTIONS", "TSAN_OPTIONS"} & set(os.environ)),
    reason="a sanitizer itself needs the memory that is refused here",
)
def test_a_system_that_gives_no_more_threads() -> None:
    words = [sys.executable, "-c", NO_MORE_THREADS, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the system gives no more threads\ngoes on\n"
