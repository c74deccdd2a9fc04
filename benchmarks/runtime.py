"""What running must show, in one run: bedplate beside its runtime before (c8bd865), llama.cpp and OpenVINO.

    python benchmarks/runtime.py FOLDER --peers PYTHON --before PYTHON [--rounds N] [--only NAME]

models.py has made FOLDER. PYTHON are those of environments with `llama-cpp-python` and `openvino-genai`, and with
bedplate of commit c8bd865. Each system runs in a process of its own, with 2 threads (`systems/`). All take turns for
several rounds, and the best of a system's rounds counts, because what else the machine does only takes away. Prints
Markdown tables, and writes all figures under the machine's name into runtime.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bedplate import _native

HERE = Path(__file__).parent
Figures = dict[str, float]
OURS, BEFORE, LLAMA_CPP, OPENVINO = "bedplate", "c8bd865", "llama.cpp", "OpenVINO"
PEERS = (LLAMA_CPP, OPENVINO)
POSITIONS = {"decode": 16, "decode_800": 800, "avx2": 16}
KV_BYTES = {OURS: 2, BEFORE: 4, LLAMA_CPP: 2, OPENVINO: 1}  # of a number
MEMORY_MB = 2000  # read to measure how fast memory is: more than any cache holds
BUILD = "from bedplate.cli.main import main; main()"


@dataclass(frozen=True)
class Effort:
    """How long a model is measured. A speed is that of the fastest `window` tokens in a row, of `turns` times as many.

    starts: how often processes start, to measure the time to the first token.
    """

    window: int
    turns: int
    starts: int


EFFORTS = {"135M": Effort(25, 8, 5), "0.6B": Effort(16, 4, 3), "1B": Effort(16, 3, 3)}


@dataclass(frozen=True)
class Goal:
    """What a figure must reach, for the small model and for the large ones. most: it must be at most this."""

    small: float | None
    large: float | None
    most: bool = False

    def of(self, model: str) -> float | None:
        return self.small if model == "135M" else self.large

    def met(self, model: str, value: float) -> bool:
        wanted = self.of(model)
        return wanted is None or (value <= wanted if self.most else value >= wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=EFFORTS)
    options = parser.parse_args()
    begin = time.perf_counter()
    models = [options.only] if options.only else list(EFFORTS)
    folders = {model: options.folder.absolute() / model for model in models}
    pythons = {
        OURS: Path(sys.executable),
        BEFORE: options.before.absolute(),
        **dict.fromkeys(PEERS, options.peers.absolute()),
    }
    found: dict[str, dict[str, list[Figures]]] = {model: {} for model in models}
    with tempfile.TemporaryDirectory() as scratch:
        bandwidth = Bandwidth(Path(scratch))
        for number in range(options.rounds):
            for model, folder in folders.items():
                print(f"round {number + 1}, {model}", file=sys.stderr, flush=True)
                for system, figures in one_round(folder, EFFORTS[model], pythons, bandwidth):
                    found[model].setdefault(system, []).append(figures)
        for model, folder in folders.items():
            print(f"start and build, {model}", file=sys.stderr, flush=True)
            for system, figures in starts(folder, EFFORTS[model].starts, pythons):
                found[model].setdefault(system, []).append(figures)
            found[model][OURS] += [build_times(folder, Path(scratch)) for _ in range(2)]
    best_of = {
        model: {system: best(rounds) for system, rounds in by_system.items()}
        for model, by_system in found.items()
    }
    keep(best_of)
    print(tables(best_of, folders))
    print(f"the run took {(time.perf_counter() - begin) / 60:.1f} minutes", file=sys.stderr)


def one_round(
    folder: Path, effort: Effort, pythons: dict[str, Path], bandwidth: Bandwidth
) -> Iterator[tuple[str, Figures]]:
    """Figures of each system once."""
    speeds = ("speeds", effort.window, effort.turns)
    hqq = [folder / "hqq"] if (folder / "hqq").exists() else []
    ours = run(pythons[OURS], "run_bedplate", *speeds, folder / "bundle", *hqq)
    yield OURS, ours
    yield OURS, run(pythons[OURS], "run_bedplate", "adapters", folder / "bundle")
    before = ("base", effort.window, effort.turns, folder / "before")
    yield BEFORE, run(pythons[BEFORE], "run_bedplate", *before)
    yield LLAMA_CPP, run(pythons[LLAMA_CPP], "run_llama_cpp", *speeds, folder / "q4_0.gguf")
    yield OPENVINO, run(pythons[OPENVINO], "run_openvino", *speeds, folder / "openvino")
    yield (
        "memory",
        {
            "gb_per_second": bandwidth.measure(MEMORY_MB),
            "as_much_gb_per_second": bandwidth.measure(round(ours["weights_mb"])),
        },
    )


def starts(folder: Path, count: int, pythons: dict[str, Path]) -> Iterator[tuple[str, Figures]]:
    """Milliseconds from the start of a process to its first token, and resident MB after 200 more tokens."""
    files = {OURS: "bundle", LLAMA_CPP: "q4_0.gguf", OPENVINO: "openvino"}
    scripts = {OURS: "run_bedplate", LLAMA_CPP: "run_llama_cpp", OPENVINO: "run_openvino"}
    for number in range(count):
        for system, file in files.items():
            tokens = 0 if number else 200
            begin = time.clock_gettime(time.CLOCK_MONOTONIC)
            figures = run(pythons[system], scripts[system], "start", folder / file, tokens)
            figures["first_token_ms"] = 1e3 * (figures.pop("first_token") - begin)
            if not tokens:
                del figures["resident_mb"]
            yield system, figures


def build_times(folder: Path, scratch: Path) -> Figures:
    """Seconds of whole processes that build a bundle without programs and add one adapter."""
    out = scratch / "built"
    seconds = {}
    for name, words in {
        "build_s": ("build", folder / "hf", "-o", out, "--force"),
        "add_s": ("add", out, folder / "adapters" / "0"),
    }.items():
        begin = time.perf_counter()
        finish([sys.executable, "-W", "ignore", "-c", BUILD, *words, "--no-programs"])
        seconds[name] = time.perf_counter() - begin
    return seconds


class Bandwidth:
    """GB/s at which two threads read memory, as `systems/bandwidth.c` measures it."""

    def __init__(self, scratch: Path) -> None:
        self._program = scratch / "bandwidth"
        source = HERE / "systems" / "bandwidth.c"
        finish(["cc", "-O3", "-march=native", "-pthread", source, "-o", self._program])

    def measure(self, megabytes: int) -> float:
        return float(finish([self._program, megabytes, 2]))


def run(python: Path, script: str, *words: object) -> Figures:
    """Figures that a script of `systems/` prints last."""
    command = [python, "-W", "ignore", HERE / "systems" / f"{script}.py", *words]
    found: Figures = json.loads(finish(command).splitlines()[-1])
    return found


def finish(command: list[object]) -> str:
    """What a process prints."""
    words = [str(word) for word in command]
    # As installed, modules are compiled once. Here, the first process of a system does it.
    compiled = str(Path(tempfile.gettempdir()) / "bedplate-benchmarks")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return done.stdout


def best(rounds: list[Figures]) -> Figures:
    """Of each figure the best: the highest speed, the lowest time and memory."""
    found: Figures = {}
    for figures in rounds:
        for name, value in figures.items():
            pick = min if name.endswith(("_ms", "_mb", "_s")) else max
            found[name] = pick(found.get(name, value), value)
    return found


def keep(found: dict[str, dict[str, Figures]]) -> None:
    file = HERE / "runtime.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[machine()] = {"date": time.strftime("%Y-%m-%d"), "models": found}
    file.write_text(json.dumps(results, indent=2) + "\n")


def machine() -> str:
    """The processor as lscpu names it, and what bedplate's kernels and the peers can use of it."""
    said = dict(line.split(":", 1) for line in finish(["lscpu"]).splitlines() if ":" in line)
    said = {name.strip(): value.strip() for name, value in said.items()}
    sets = [*_native.instruction_sets()[:1], *(["AMX"] if "amx_int8" in said["Flags"].split() else [])]
    cache = said.get("L3 cache", "unknown").partition("(")[0].strip()
    model = f"family {said['CPU family']}, model {said['Model']}"
    return f"{said['Model name']} ({model}; {', '.join(sets)}), {said['CPU(s)']} cores, {cache} L3"


def goals() -> dict[str, Goal]:
    sets = _native.instruction_sets()
    wide, amx = any("avx512" in name for name in sets), "AMX" in machine()
    return {
        "decode ÷ c8bd865": Goal(1.8, None) if wide else Goal(1.3, None),
        "decode: share of memory's limit": Goal(None, 0.95 if wide else 0.85),
        "decode with AVX2 alone: share of memory's limit": Goal(None, 0.85),
        "decode ÷ best peer": Goal(3, 2) if wide else Goal(1.6, 1.3),
        "decode from position 800 ÷ best peer": Goal(4, 2),
        "decode, default recipe ÷ `hqq`": Goal(0.97, None),
        "decode with r16 adapter, 8 bits ÷ base": Goal(0.94, 0.96),
        "decode with r16 adapter, float32 ÷ base": Goal(None, None),
        "8 sessions in a step, no adapter ÷ one": Goal(3, 4.5),
        "8 sessions in a step, one adapter ÷ one": Goal(3, 4.5),
        "8 sessions in a step, 8 adapters ÷ one": Goal(2, 3.8),
        "prefill of 241 tokens ÷ best peer": Goal(1.0, 1.0) if amx else Goal(1.5, 1.5),
        "process start to first token ÷ llama.cpp": Goal(0.5, 0.5, most=True),
        "resident after 200 tokens, MB beyond the weights": Goal(45, 45, most=True),
        "build from safetensors, `--no-programs`, s": Goal(5, None, most=True),
        "add, `--no-programs`, s": Goal(0.4, None, most=True),
        "load of an adapter, 8 bits, ms": Goal(10, 10, most=True),
        "load of an adapter, float32, ms": Goal(None, None),
        "memory of a used adapter, MB beyond its bytes": Goal(1, 1, most=True),
    }


def shown(found: dict[str, Figures], share: dict[str, Figures]) -> dict[str, tuple[float, str]]:
    """Value of each goal's row, and what it was made from."""
    ours, before = found[OURS], found[BEFORE]

    def ratio(value: float, other: float) -> tuple[float, str]:
        return value / other, f"{value:,.4g} : {other:,.4g}"

    def beside_peers(figure: str) -> tuple[float, str]:
        return ratio(ours[figure], max(found[peer][figure] for peer in PEERS))

    one = ours["decode"]
    start = found[LLAMA_CPP]["first_token_ms"]
    rows = {
        "decode ÷ c8bd865": ratio(one, before["decode"]),
        "decode: share of memory's limit": (share[OURS]["decode"], ""),
        "decode ÷ best peer": beside_peers("decode"),
        "decode from position 800 ÷ best peer": beside_peers("decode_800"),
        "decode with r16 adapter, 8 bits ÷ base": ratio(ours["8bit"], one),
        "decode with r16 adapter, float32 ÷ base": ratio(ours["float32"], one),
        "8 sessions in a step, no adapter ÷ one": ratio(ours["batch"], one),
        "8 sessions in a step, one adapter ÷ one": ratio(ours["batch_one_adapter"], one),
        "8 sessions in a step, 8 adapters ÷ one": ratio(ours["batch_adapters"], one),
        "prefill of 241 tokens ÷ best peer": beside_peers("prefill"),
        "process start to first token ÷ llama.cpp": ratio(ours["first_token_ms"], start),
        "resident after 200 tokens, MB beyond the weights": (
            ours["resident_mb"] - ours["weights_mb"],
            f"{ours['resident_mb']:.0f} − {ours['weights_mb']:.0f}",
        ),
        "build from safetensors, `--no-programs`, s": (ours["build_s"], ""),
        "add, `--no-programs`, s": (ours["add_s"], ""),
        "load of an adapter, 8 bits, ms": (ours["load_8bit_ms"], ""),
        "load of an adapter, float32, ms": (ours["load_float32_ms"], ""),
        "memory of a used adapter, MB beyond its bytes": (ours["beyond_bytes_mb"], ""),
    }
    if "avx2" in ours:
        alone = "decode with AVX2 alone: share of memory's limit"
        rows[alone] = (share[OURS]["avx2"], f"{ours['avx2']:.4g}")
    if "hqq" in ours:
        rows["decode, default recipe ÷ `hqq`"] = ratio(one, ours["hqq"])
    return rows


def shares(found: dict[str, Figures], folder: Path) -> dict[str, Figures]:
    """Of each decode speed: the bytes that it reads a second ÷ those that memory gives."""
    config = json.loads((folder / "hf" / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    ours = found[OURS]["weights_mb"] * 1e6
    weights = {
        OURS: ours,
        BEFORE: ours,
        LLAMA_CPP: (folder / "q4_0.gguf").stat().st_size,
        OPENVINO: (folder / "openvino" / "openvino_model.bin").stat().st_size,
    }
    return {
        system: {
            figure: (nbytes + numbers * KV_BYTES[system] * position)
            * found[system][figure]
            / (1e9 * found["memory"]["gb_per_second"])
            for figure, position in POSITIONS.items()
            if figure in found[system]
        }
        for system, nbytes in weights.items()
    }


def tables(found: dict[str, dict[str, Figures]], folders: dict[str, Path]) -> str:
    share = {model: shares(by_system, folders[model]) for model, by_system in found.items()}
    lines = [f"{time.strftime('%Y-%m-%d')}, {machine()}. What misses its goal is bold.", ""]
    lines += [f"| | {' | '.join(found)} | goal: 135M · larger |", f"|---|{'---|' * (len(found) + 1)}"]
    rows = {model: shown(by_system, share[model]) for model, by_system in found.items()}
    for label, goal in goals().items():
        cells = [cell(label, goal, model, rows[model]) for model in found]
        wanted = " · ".join("–" if value is None else f"{value:g}" for value in (goal.small, goal.large))
        lines.append(f"| {label} | {' | '.join(cells)} | {'≤' if goal.most else '≥'} {wanted} |")
    for model, by_system in found.items():
        systems = [OURS, BEFORE, *PEERS]
        lines += ["", f"{model}: memory gives {by_system['memory']['gb_per_second']:.1f} GB/s, and"]
        lines[-1] += (
            f" {by_system['memory']['as_much_gb_per_second']:.1f} where it reads as much as the weights"
        )
        lines += ["", f"| | {' | '.join(systems)} |", f"|---|{'---|' * len(systems)}"]
        for figure in ("decode", "decode_800", "prefill", "first_token_ms", "resident_mb"):
            cells = [plain(figure, by_system[system], share[model][system]) for system in systems]
            lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(label: str, goal: Goal, model: str, rows: dict[str, tuple[float, str]]) -> str:
    if label not in rows:
        return "–"
    value, made_of = rows[label]
    said = f"{value:.3g}" if goal.met(model, value) else f"**{value:.3g}**"
    return f"{said} ({made_of})" if made_of else said


def plain(figure: str, figures: Figures, share: Figures) -> str:
    if figure not in figures:
        return "–"
    return f"{figures[figure]:,.4g}" + (f" ({share[figure]:.2f} of the limit)" if figure in share else "")


if __name__ == "__main__":
    main()
