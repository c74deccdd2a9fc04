"""Long texts become tokens while other threads run."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bedplate import Bundle, Engine
from bedplate.runtime import encoding


def test_other_threads_run_meanwhile(toy_bundle: Bundle) -> None:
    """A text of 8 MB takes seconds, in which other threads had less than a hundredth of the time."""
    backend, ended, beats = Engine(toy_bundle).tokenizer._backend, threading.Event(), [0]

    def beat() -> None:
        while not ended.is_set():
            time.sleep(0.001)
            beats[0] += 1

    thread = threading.Thread(target=beat)
    thread.start()
    begun = time.perf_counter()
    encoding.encoding_of(backend, "the fox " * (1 << 20))
    took, counted = time.perf_counter() - begun, beats[0]
    ended.set()
    thread.join()
    assert counted > 20 * took  # of some 900 a second


@given(text=st.text(st.sampled_from("the fox <|im_end|>\n 0é\u0301漢"), max_size=60), special=st.booleans())
@settings(max_examples=40)
def test_a_long_text_has_the_same_tokens(toy_bundle: Bundle, text: str, special: bool) -> None:
    backend = Engine(toy_bundle).tokenizer._backend
    expected = backend.encode(text, add_special_tokens=special)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_LONG", 0)
        found = encoding.encoding_of(backend, text, add_special_tokens=special)
    assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
