from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from bedplate.runtime.text import StopFilter, TextStream


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_of_characters_split_over_tokens_join_to_the_text(text: str) -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.binary())
def test_bytes_that_are_no_text_come_out_as_the_decoder_has_them(data: bytes) -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in data]
    assert "".join(pieces) + stream.finish() == decode_bytes(data)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert stream.finish() == ""


def test_a_decoder_that_drops_the_first_space_is_asked_with_what_precedes() -> None:
    words = {1: " one", 2: " two"}
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [stream.push(i) for i in (1, 2, 1)] == ["one", " two", " one"]


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_text_ends_where_the_first_stop_string_begins(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter, shown = StopFilter(stops), ""
    for begin, end in itertools.pairwise(edges):
        shown += stop_filter.push(text[begin:end])
        if stop_filter.stopped:
            break
    shown += stop_filter.finish()
    ends = [
        len(prefix) for prefix in (text[:n] for n in range(len(text) + 1)) if prefix.endswith(tuple(stops))
    ]
    if not stops or not ends:
        assert shown == text and not stop_filter.stopped
        return
    assert stop_filter.stopped
    assert shown in {text[: text.find(stop)] for stop in stops if stop in text}
    assert not any(stop in shown for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["\nUser:"])
    assert [stop_filter.push(piece) for piece in ("Hi", "\nUs", "ual", "\nUser", ": you")] == [
        "Hi",
        "",
        "\nUsual",
        "",
        "",
    ]
    assert stop_filter.stopped and stop_filter.push("more") == "" and stop_filter.finish() == ""
