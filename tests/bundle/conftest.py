from __future__ import annotations

from pathlib import Path

import pytest
from toy_bundle import adapter_writer, write_base

from bedplate.bundle.store import Bundle, create_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with the adapters `one` and `two`."""
    made = create_bundle(tmp_path / "toy.bundle", write_base)
    made.add_adapters({"one": adapter_writer(made, "one", 10)})
    made.add_adapters({"two": adapter_writer(made, "two", 20)})
    return made
