"""Every test of the kernels runs on each instruction set that they are compiled for and this machine has."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from bedplate import _native

COMPILED = {
    "x86_64": ["avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2", "baseline"],
    "aarch64": ["dotprod", "baseline"],
}[platform.machine()]


@pytest.fixture(params=COMPILED, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of decoders that the test makes. Skipped, and so listed by the run, where the machine lacks it."""
    assert set(_native.instruction_sets()) <= set(COMPILED)
    if request.param not in _native.instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    best = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(best)
