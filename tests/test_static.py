"""Programs of fixed shapes, in ExecuTorch's own runtime, beside the programs that take any number of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from shared import Shared
from toy import BuildToy, save_adapter, save_toy_model, toy_config

from bedplate.api import Bundle
from bedplate.bundle import usage
from bedplate.bundle.usage import BASE
from bedplate.oracle import StaticProgram, static_program, stock_program

pytestmark = pytest.mark.slow

TEXT = [5, 9, 13, 2, 7, 11, 300, 1, 5, 44, 17, 17, 8, 250, 3, 99, 12]
CONTEXT = 24
RECIPES = {
    "float": {"quantize": "none", "static_shapes": (6, 1)},
    "8da4w": {"static_shapes": (5, 2), "split_heads": True},
}


@pytest.fixture(scope="module")
def model(shared: Shared) -> Path:
    return shared.made(
        "static.model", lambda folder: save_toy_model(folder, toy_config(num_hidden_layers=2), seed=8)
    )


@pytest.fixture(scope="module")
def adapter(shared: Shared, model: Path) -> Path:
    return shared.made("static.adapter", lambda folder: save_adapter(folder, model, seed=9))


@pytest.fixture(scope="module", params=RECIPES)
def bundle(
    request: pytest.FixtureRequest, shared: Shared, build_toy: BuildToy, model: Path, adapter: Path
) -> Bundle:
    def make(out: Path) -> None:
        made = build_toy(model, out=out, max_context=CONTEXT, **RECIPES[request.param])
        made.add(adapter, name="a", unit_cache=shared.units)

    return Bundle.open(shared.made(f"static.{request.param}.bundle", make))


@pytest.fixture(scope="module", params=[BASE, "a"])
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def program(bundle: Bundle, name: str) -> StaticProgram:
    return static_program(bundle, name)


@pytest.fixture(scope="module")
def expected(bundle: Bundle, name: str) -> NDArray[np.float32]:
    """Of the program that takes any number of tokens."""
    return stock_program(bundle, name).logits(TEXT)


def check(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_decoding_gives_the_logits_of_the_other_program(
    program: StaticProgram, expected: NDArray[np.float32]
) -> None:
    check(program.logits(TEXT), expected)


def test_prefill_in_pieces_and_then_decode(program: StaticProgram, expected: NDArray[np.float32]) -> None:
    assert len(TEXT[:14]) % program.limits.max_seq_len, "the last piece is filled up"
    check(program.step(TEXT[:14], 0), expected[13])
    for position in range(14, len(TEXT)):
        check(program.step(TEXT[position : position + 1], position), expected[position])
    check(program.step(TEXT[3:8], 3), expected[7])


def test_files(bundle: Bundle, adapter: Path) -> None:
    print([(u.name, u.keys) for u in usage.sharing(bundle).programs], bundle.static_program.stat().st_size)
