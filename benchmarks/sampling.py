"""How long it takes to choose a token: natively, and as numpy does it by sorting the vocabulary.

    python benchmarks/sampling.py [--vocab N] [--runs N] [-o FILE]

Rows of logits are random. `flat`: most tokens are in the nucleus of 0.95. `peaked`: a few are, as in models. For each
instruction set that this machine has. Prints a table of medians, and writes JSON: a draw takes one pass or several, as
chance has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate import _native

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/native"))
logits_of = import_module("test_logits").logits_of  # as a step gives them
native_sampler = import_module("sampling_formula").native_sampler

ROWS = {"flat": 1.0, "peaked": 3.0}  # the standard deviation of logits
RULES: dict[str, dict[str, Any]] = {
    "the likeliest": {"temperature": 0.0},
    "all": {},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.5": {"top_p": 0.5},
    "top-k 50": {"top_k": 50},
    "min-p 0.05": {"min_p": 0.05},
    "top-p 0.95, repetition 1.1 of 1,000 tokens": {"top_p": 0.95, "repetition": 1.1, "prompt": range(1000)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    sets = _native.instruction_sets()
    found: dict[str, dict[str, float]] = {}
    for name, width in ROWS.items():
        random = np.random.default_rng(0)
        logits = logits_of(random.normal(size=options.vocab).astype(np.float32) * width, [0])
        for rule, rules in RULES.items():
            row = found[f"{name}, {rule}"] = {}
            for instruction_set in sets:
                _native.use_instruction_set(instruction_set)
                sampler = native_sampler(**rules)
                row[instruction_set] = median_ms(lambda: sampler.choose(logits), options.runs)  # noqa: B023
        by_sorting = median_ms(lambda: sorted_draw(logits.array[0], 0.95, random), options.runs // 20)  # noqa: B023
        found[f"{name}, top-p 0.95"]["numpy"] = by_sorting
    columns = [*sets, "numpy"]
    print("| ms | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for case, times in found.items():
        cells = [f"{times[column]:.3f}" if column in times else "–" for column in columns]
        print(f"| {case} | " + " | ".join(cells) + " |")
    options.out.write_text(json.dumps({"vocab": options.vocab, "ms": found}, indent=1) + "\n")


def median_ms(call: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 4)


def sorted_draw(logits: NDArray[np.float32], top_p: float, random: np.random.Generator) -> int:
    """The usual way: the whole vocabulary, the likeliest first."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits, kind="stable")
    ranked = weights[order] / weights[order].sum()
    kept = order[np.cumsum(ranked) - ranked < top_p]
    cumulative = np.cumsum(weights[kept])
    return int(kept[np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")])


if __name__ == "__main__":
    main()
