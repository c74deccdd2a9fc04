"""What many conversations at once must show, in one run.

    python benchmarks/engine.py FOLDER [--rounds N] [--only NAME]

models.py has made FOLDER. Each measurement is a process of its own, with 2 threads (`systems/run_engine.py`,
`systems/run_bedplate.py`). It compares what it measures in turns, and the best of its rounds counts. Prints a Markdown
table, and writes all figures under the machine's name into engine.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime import Figures, Goal, best, cell, finish, machine, run

import bedplate

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
EFFORTS = {"135M": (25, 6), "1B": (12, 3)}  # tokens in a row that are measured, and how often
INVOCATION = [1, 4093, 104, 9531, 198]  # `<|im_start|>` and words
WITH_LOOKUP = "135M"  # the model that the example `extract` is for
GOALS = {
    "8 sessions with 8 adapters, a thread for each ÷ bare steps": Goal(0.95, 0.95),
    "8 sessions with 8 adapters, in one thread ÷ bare steps": Goal(0.95, 0.95),
    "one session ÷ bare steps": Goal(0.98, 0.98),
    "first token of a short prompt while 1,500 tokens are read ÷ alone": Goal(3, 3, most=True),
    "first token of a follow-up after 1,500 tokens, in the session ÷ cold": Goal(0.1, 0.1, most=True),
    "first token of a follow-up after 1,500 tokens, from the cache ÷ cold": Goal(0.1, 0.1, most=True),
    "aLoRA after 1,500 tokens with the base ÷ cold": Goal(0.1, 0.1, most=True),
    "`extract`, speculation by lookup ÷ without": Goal(1.5, 1.5),
    "200 prompts over 4 adapters ÷ one by one": Goal(3, 4),
    "top-p 0.95 of 150,000 tokens, ms": Goal(0.1, 0.1, most=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=EFFORTS)
    options = parser.parse_args()
    begin = time.perf_counter()
    models = [options.only] if options.only else list(EFFORTS)
    found: dict[str, list[Figures]] = {model: [] for model in models}
    for number in range(options.rounds):
        for model in models:
            print(f"round {number + 1}, {model}", file=sys.stderr, flush=True)
            found[model] += one_round(model, options.folder.absolute() / model)
    figures = {model: best(rounds) for model, rounds in found.items()}
    keep(figures)
    print(table(figures))
    print(f"the run took {(time.perf_counter() - begin) / 60:.1f} minutes", file=sys.stderr)


def one_round(model: str, folder: Path) -> Iterator[Figures]:
    python, bundle = Path(sys.executable), folder / "bundle"
    yield run(python, "run_engine", "sessions", *EFFORTS[model], bundle)
    yield run(python, "run_engine", "waiting", bundle)
    yield run(python, "run_engine", "batch", bundle)
    yield times(run(python, "run_bedplate", "follow_up", bundle, "a0"), "follow_up")
    yield times(
        run(python, "run_bedplate", "alora", with_adapter(folder, "alora", activated), "alora"), "alora"
    )
    if model == WITH_LOOKUP:
        tasks = EXAMPLES / "data" / "extract.heldout.jsonl"
        yield run(python, "run_engine", "lookup", with_adapter(folder, "extract", example), tasks)
    yield sampling()


def times(figures: Figures, prefix: str) -> Figures:
    """Of the ways to answer, all of which must have given the same."""
    if figures["answers"] != 1:
        raise SystemExit(f"{prefix}: answers differ")
    return {f"{prefix}_{name}": value for name, value in figures.items() if name.endswith("_ms")}


def with_adapter(folder: Path, name: str, make: Callable[[Path, Path], Path]) -> Path:
    """A bundle of the same foundation with one more adapter, made when it is first asked for.

    make: gets the folder of the model and a scratch folder, and returns the adapter as PEFT saves it.
    """
    path = folder / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # A bundle's files are replaced, never written to, so both can have the same.
            draft = Path(shutil.copytree(folder / "bundle", Path(scratch) / "bundle", copy_function=os.link))
            bedplate.Bundle.open(draft).add(make(folder, Path(scratch)), name=name, programs=False)
            draft.rename(path)
    return path


def example(_: Path, __: Path) -> Path:
    return EXAMPLES / "adapters" / "extract"


def activated(folder: Path, scratch: Path) -> Path:
    """An adapter of random weights that is on from its invocation on."""
    made = Path(shutil.copytree(folder / "adapters" / "0", scratch / "alora"))
    config = made / "adapter_config.json"
    said = json.loads(config.read_text()) | {"alora_invocation_tokens": INVOCATION}
    config.write_text(json.dumps(said))
    return made


def sampling() -> Figures:
    """Of the best instruction set, where a few tokens are in the nucleus, as in models."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        finish([sys.executable, HERE / "sampling.py", "--runs", 100, "-o", file.name])
        row = json.loads(Path(file.name).read_text())["ms"]["peaked, top-p 0.95"]
    return {"sampling_ms": min(value for name, value in row.items() if name != "numpy")}


def keep(found: dict[str, Figures]) -> None:
    file = HERE / "engine.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[machine()] = {"date": time.strftime("%Y-%m-%d"), "models": found}
    file.write_text(json.dumps(results, indent=2) + "\n")


def shown(found: Figures) -> dict[str, tuple[float, str]]:
    """Value of each goal's row, and what it was made from. A row whose figures are not there is left out."""
    pairs = zip(
        GOALS,
        (
            ("threads", "bare_batch"),
            ("round_robin", "bare_batch"),
            ("one", "bare_one"),
            ("beside_ms", "alone_ms"),
            ("follow_up_session_ms", "follow_up_cold_ms"),
            ("follow_up_cache_ms", "follow_up_cold_ms"),
            ("alora_session_ms", "alora_cold_ms"),
            ("with_lookup", "without_lookup"),
            ("at_once", "one_by_one"),
        ),
        strict=False,
    )
    rows = {
        label: (found[value] / found[other], f"{found[value]:,.4g} : {found[other]:,.4g}")
        for label, (value, other) in pairs
        if value in found and other in found
    }
    rows[[*GOALS][-1]] = (found["sampling_ms"], "")
    return rows


def table(found: dict[str, Figures]) -> str:
    lines = [f"{time.strftime('%Y-%m-%d')}, {machine()}. What misses its goal is bold.", ""]
    lines += [f"| | {' | '.join(found)} | goal: 135M · 1B |", f"|---|{'---|' * (len(found) + 1)}"]
    rows = {model: shown(figures) for model, figures in found.items()}
    for label, goal in GOALS.items():
        cells = [cell(label, goal, model, rows[model]) for model in found]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {'≤' if goal.most else '≥'} {goal.small:g} · {goal.large:g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
