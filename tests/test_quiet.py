"""What importing torch through bedplate changes, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
