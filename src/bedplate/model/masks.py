"""Windows for the stock attention operator, which has none: masks, cut from a table at each step.

How far a key lies before a query decides whether it is seen. So one table serves all positions of a step: it is as
wide as two contexts, and the cut of one context moves along it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class WindowMasks(nn.Module):
    """What is added to scores, 0 or -inf, for each window: a table [rows of a step, 2 · C - 1].

    Column t of row s is for the query at position `pos` + s and the key at position `pos` + t - (C - 1).
    """

    def __init__(self, windows: Iterable[int], max_context: int, max_chunk: int) -> None:
        super().__init__()
        self.windows, self.max_context = tuple(windows), max_context
        for window in self.windows:
            table = window_mask(window, max_context, max_chunk)
            self.register_buffer(f"window_{window}", table, persistent=False)

    def at(self, pos: int, length: int) -> Mapping[int, Tensor]:
        """The mask of each window, [S, C], for queries at positions pos … pos + length - 1 and all keys."""
        tables = {window: self.get_buffer(f"window_{window}") for window in self.windows}
        return {
            window: table.narrow(0, 0, length).narrow(1, self.max_context - 1 - pos, self.max_context)
            for window, table in tables.items()
        }


def window_mask(window: int, max_context: int, max_chunk: int) -> Tensor:
    """Float32 [max_chunk, 2 · max_context - 1]."""
    keys = torch.arange(1 - max_context, max_context, device="cpu")[None, :]
    behind = torch.arange(max_chunk, device="cpu")[:, None] - keys
    return torch.where((behind >= 0) & (behind < window), 0.0, -torch.inf)
