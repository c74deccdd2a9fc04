"""What importing torch through bedplate changes, and what it leaves alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from bedplate.quiet import rare_collections

IMPORT = """
import os
from bedplate.quiet import import_modules
before = dict(os.environ)
import_modules(["torch"])
assert dict(os.environ) == before
"""


@pytest.mark.parametrize(("wish", "found"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_wait_in_their_sleep_unless_the_user_wishes_otherwise(wish: str | None, found: str) -> None:
    """OpenMP tells what it read when it was loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if wish is None else {"OMP_WAIT_POLICY": wish})
    words = [sys.executable, "-c", IMPORT]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{found}'" in done.stderr


def test_where_a_matrix_lies_changes_no_product() -> None:
    """On processors of AMD, MKL's product of few rows depends on it, unless it is told otherwise."""
    generator = torch.Generator().manual_seed(0)
    row, matrix = torch.randn(1, 64, generator=generator), torch.randn(96 * 64, generator=generator)
    products = set()
    for offset in range(16):
        moved = torch.zeros(16 + len(matrix))[offset : offset + len(matrix)].copy_(matrix)
        products.add((row @ moved.view(96, 64).T).numpy().tobytes())
    assert len(products) == 1


def test_rarely_inside_and_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before


def test_contexts_that_overlap_leave_what_was_before() -> None:
    before = gc.get_threshold()
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_caller_who_wants_it_more_rarely_keeps_that() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(10**6, *before[1:])
        with rare_collections():
            assert gc.get_threshold()[0] == 10**6
    finally:
        gc.set_threshold(*before)
