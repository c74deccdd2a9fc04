"""PEFT's own LoRA options, on a toy Llama: bedplate computes what PEFT does with them, or names what it refuses.

The options are read from the tests in PEFT's source distribution: whatever its authors thought worth a test.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft_options import download_tests, lora_options
from peft_oracle import TOKENS, TOLERANCE, Oracle
from toy import save_toy_model, toy_config

from bedplate.errors import BedplateError
from bedplate.runtime.weights import last_place

pytestmark = pytest.mark.slow

PARTS = 6
# What a refusal may name, beside the fields that are set; PEFT sets modules_to_save by itself for some tasks.
ALSO_NAMED = ("lm_head", "embed_tokens", "modules_to_save")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("small") / "model"
    save_toy_model(folder, toy_config(num_hidden_layers=2, tie_word_embeddings=False))
    return Oracle(folder)


@pytest.fixture(scope="module")
def all_options(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    options, unknown = lora_options(download_tests(request.config.cache.mkdir("peft-tests")))
    print(f"{len(options)} sets of options in PEFT's tests; {unknown} more are made while they run")
    assert len(options) > 200
    return options


def outcome(options: dict[str, Any], oracle: Oracle, folder: Path) -> str:
    """What became of it; fails where bedplate is wrong, or refuses without a name."""
    try:
        oracle.save(folder, LoraConfig(**options))
    except Exception:  # not for a Llama, or one of PEFT's tests of its errors
        return "PEFT makes none"
    try:
        adapter = oracle.read(folder)
    except BedplateError as error:
        # `r` is in many words, and nothing is refused for what it says.
        named = [name for name in (*ALSO_NAMED, *(options.keys() - {"r"})) if name in str(error)]
        assert named, (options, str(error))
        return f"refused: {named[0]}"
    expected = oracle.peft(folder)
    difference = float((oracle.applied(adapter) - expected).abs().max())
    assert difference < TOLERANCE, options
    off = not options.get("lora_alpha", 1)
    if adapter.invocation is not None:
        off = last_place(adapter.invocation, TOKENS[0].tolist()) is None
    assert (float((expected - oracle.base).abs().max()) > 10 * TOLERANCE) != off, options
    return "equal"


@pytest.mark.parametrize("part", range(PARTS))
def test_options_of_peft(
    part: int, all_options: list[dict[str, Any]], oracle: Oracle, tmp_path: Path
) -> None:
    results = Counter(
        outcome(options, oracle, tmp_path / str(number))
        for number, options in enumerate(all_options[part::PARTS])
    )
    print(dict(results))
    assert results["equal"] >= 10


def test_sums_of_peft(all_options: list[dict[str, Any]], oracle: Oracle, tmp_path: Path) -> None:
    """PEFT's own weighted sums of its options, by concatenated ranks: bedplate's `merge` of the same two adapters."""
    other = oracle.save(
        tmp_path / "other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    )
    results: Counter[str] = Counter()
    for number, options in enumerate(all_options[:: len(all_options) // 40]):
        # PEFT multiplies a sum by the square root of its rank, if its first adapter is rank-stabilized.
        if not options.get("use_rslora"):
            results[of_sum(options, other, oracle, tmp_path / str(number))] += 1
    print(dict(results))
    assert results["equal"] >= 8


def of_sum(options: dict[str, Any], other: Path, oracle: Oracle, folder: Path) -> str:
    weights = {"one": 0.6, "other": -0.4}
    try:
        oracle.save(folder, LoraConfig(**options))
        expected = oracle.sum_of({"one": folder, "other": other}, weights)
    except Exception:
        return "PEFT makes none"
    try:
        found = oracle.merged_sum({"one": folder, "other": other}, weights)
    except BedplateError as error:
        named = [name for name in (*ALSO_NAMED, *(options.keys() - {"r"})) if name in str(error)]
        assert named or "which cannot be summed" in str(error), (options, str(error))
        return "refused"
    assert float((found - expected).abs().max()) < TOLERANCE, options
    return "equal"
