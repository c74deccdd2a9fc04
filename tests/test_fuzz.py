"""Some hundred cases of tests/fuzz.py; BEDPLATE_FUZZ_CASES=N runs more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz import BUNDLES, Fuzz, make_bundles

CASES = int(os.environ.get("BEDPLATE_FUZZ_CASES", "500"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_bundles(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("number", range(len(BUNDLES)), ids=BUNDLES)
def test_a_hostile_bundle_ends_in_an_error_or_in_numbers(
    number: int, bundles: list[Path], tmp_path: Path
) -> None:
    fuzz = Fuzz(bundles[number], tmp_path)
    results = [fuzz.run(13, case).result for case in range(number, CASES, len(BUNDLES))]
    numbers = sum(result.endswith("numbers") for result in results)
    # Both ends are reached: a fuzz whose every case is refused at the door finds nothing behind it.
    assert 0.15 * len(results) < numbers < 0.85 * len(results)
