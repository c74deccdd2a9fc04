from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from bedplate.runtime import text
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


BYTES_AND_WORDS = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def decode_fallback(ids: Sequence[int]) -> str:
    """As sentencepiece does, whose tokens are bytes or texts: one byte amiss spoils its neighbours."""
    return str(BYTES_AND_WORDS.decode([f"<0x{i:02X}>" if i < 256 else "café"[: i - 255] for i in ids]))


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 259), st.sampled_from([*"語é€".encode(), 0xFF, 0xE4])), max_size=40))
@example([0xFF, *"語語語語語".encode(), 257, *"語".encode()])
@example([*"語語語語語".encode()] * 2)
def test_what_waits_long_comes_as_if_all_were_decoded_each_time(ids: list[int]) -> None:
    def pieces() -> list[str]:
        stream = TextStream(decode_fallback)
        return [*map(stream.push, ids), stream.finish()]

    with mock.patch.object(text, "_MOST", len(ids)):
        expected = pieces()
    assert pieces() == expected


@pytest.mark.parametrize("decode", [decode_bytes, decode_fallback])
def test_a_long_run_of_bytes_that_are_no_text_costs_no_more_a_token(decode: Callable[..., str]) -> None:
    decoded = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    stream = TextStream(counted)
    assert "".join(stream.push(0xFF) for _ in range(2000)) == ""
    assert decoded < 20 * 2000
    assert "".join([stream.push(ord("a")), stream.finish()]) == decode([*[0xFF] * 2000, ord("a")])


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert stream.finish() == ""


def test_a_decoder_that_drops_the_first_space_is_asked_with_what_precedes() -> None:
    words = {1: " one", 2: " two"}
    stream = TextStream(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [stream.push(i) for i in (1, 2, 1)] == ["one", " two", " one"]


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is complete first; of those complete at one character, the longest."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths)
    return None


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@example(text="abcd", stops=["abcd", "b"], cuts=[])
@example(text="abcd", stops=["abcd", "b"], cuts=[1, 2, 3])
@example(text="xabcab", stops=["bc", "abc", "c"], cuts=[2])
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter, shown = StopFilter(stops), ""
    for begin, end in itertools.pairwise(edges):
        shown += stop_filter.push(text[begin:end])
        at = first_stop(text[:end], stops)
        assert stop_filter.stopped == (at is not None)
        # All is shown that cannot be the beginning of a stop string.
        open_ends = [n for stop in stops for n in range(1, len(stop)) if text[:end].endswith(stop[:n])]
        assert shown == text[: at if at is not None else end - max(open_ends, default=0)]
    shown += stop_filter.finish()
    assert shown == text[: first_stop(text, stops)]


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
