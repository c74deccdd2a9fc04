"""Masks of windows: every cut of the table is what its positions say."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bedplate.model.masks import WindowMasks


@given(st.data())
def test_a_mask_lets_a_query_see_its_window(data: st.DataObject) -> None:
    context = data.draw(st.integers(1, 12))
    chunk = data.draw(st.integers(1, context))
    windows = data.draw(st.sets(st.integers(1, context), min_size=1, max_size=2))
    length = data.draw(st.integers(1, chunk))
    pos = data.draw(st.integers(0, context - length))
    masks = WindowMasks(windows, context, chunk).at(pos, length)
    assert masks.keys() == windows
    for window, mask in masks.items():
        expected = [
            [0.0 if query - window < key <= query else -torch.inf for key in range(context)]
            for query in range(pos, pos + length)
        ]
        assert torch.equal(mask, torch.tensor(expected))
