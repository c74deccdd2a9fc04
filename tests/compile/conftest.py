from __future__ import annotations

from collections.abc import Iterator

import pytest

from bedplate.executorch_1_5 import XNNGraph, delegate_graphs


@pytest.fixture
def graphs() -> Iterator[list[XNNGraph]]:
    """The graphs that are written from here on."""
    written: list[XNNGraph] = []
    with delegate_graphs(written.append):
        yield written
