"""Rows of many sessions in one step, and what each comes to alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bedplate import _native


class Member(NamedTuple):
    """A text in a session of its own. alone: the logits of each position, token by token."""

    text: Sequence[int]
    adapter: _native.Adapter | None
    alone: Any


def check(drawn: random.Random, decoder: _native.Decoder, members: Sequence[Member]) -> None:
    """Compute all texts in steps of any rows, in any order, pieces and number, wanted or not: each wanted row has the
    same bits as alone, and -inf beyond them.
    """
    sessions, done = [decoder.kv(half=False) for _ in members], [0] * len(members)
    while any(at < len(member.text) for at, member in zip(done, members, strict=True)):
        rows: list[tuple[_native.Row, Any]] = []
        for number, (text, adapter, alone) in enumerate(members):
            for _ in range(min(drawn.choice([0, 0, 1, 1, 5, 30]), len(text) - done[number])):
                at = done[number]
                row = (text[at], at, sessions[number], adapter, 1.0, drawn.random() < 0.5)
                rows.append((row, alone[at]))
                done[number] += 1
        drawn.shuffle(rows)
        if not rows:
            continue
        got = decoder.step([row for row, _ in rows]).array
        for one, other in zip(got, [expected for row, expected in rows if row[-1]], strict=True):
            assert one[: len(other)].tobytes() == other.tobytes()
            assert (one[len(other) :] == -np.inf).all()
