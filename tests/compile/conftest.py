from __future__ import annotations

from typing import Any

import pytest
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[XNNGraph]:
    """The graphs that are written from here on."""
    written: list[XNNGraph] = []
    serialize = xnnpack_preprocess.serialize_xnnpack_binary

    def note(graph: XNNGraph, constant_data: bytearray) -> Any:
        written.append(graph)
        return serialize(graph, constant_data)

    monkeypatch.setattr(xnnpack_preprocess, "serialize_xnnpack_binary", note)
    return written
