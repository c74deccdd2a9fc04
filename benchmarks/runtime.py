"""Speed and memory of running, beside ExecuTorch's own runtime, llama.cpp and OpenVINO, in one run.

    python benchmarks/runtime.py BUNDLE --machine WORDS --adapter NAME --adapter8 NAME
        [--stock FILE] [--other PYTHON --gguf FILE --openvino FOLDER]

BUNDLE holds a rank-16 adapter on all seven linears twice: in float32 (--adapter) and in 8 bits (--adapter8). The file
--stock is the program that ExecuTorch's `export_llm` makes of the model (build.py has it made). PYTHON is that of an
environment with `openvino-genai` and `llama-cpp-python`; FILE is the model as Q4_0, FOLDER what `optimum-cli export
openvino` made. Each system runs in a process of its own, with 2 threads, and all take turns for several rounds: the
best of a system's rounds counts, for what else the machine does only takes away. Prints a Markdown table, and writes
its figures under WORDS into runtime.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS, GENERATIONS = 3, 7
# Each reads its arguments and prints one JSON object of figures. Speeds in tokens/s, times in ms, memory in MB.
COMMON = """
import json, os, sys, time
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
def seconds(work):
    start = time.perf_counter(); work(); return time.perf_counter() - start
def moments(step, count):
    found = [time.perf_counter()]
    for i in range(count): step(PROMPT[i]); found.append(time.perf_counter())
    return found
# Over the fastest 50 tokens in a row: what else the machine does comes in bursts.
def speed(times): return max(50 / (end - start) for start, end in zip(times, times[50:]))
PROMPT = [(i * 7919) % 40000 + 100 for i in range(1000)]
"""
BEDPLATE = """
import bedplate
path, adapter, adapter8 = sys.argv[1:]
bundle = bedplate.Bundle.open(path, check=False)
engine = bedplate.Engine(bundle, threads=2)
def decode(session, start, count):
    session.reset()
    session.step(PROMPT[:start])
    return speed(moments(lambda token: session.step([token]), count))
# Tokens of all sessions together: each step takes one of each.
def batch(names, count=200):
    sessions = [engine.session(name) for name in names]
    engine.step([(one, PROMPT[:16]) for one in sessions])
    return len(sessions) * speed(moments(lambda token: engine.step([(one, [token]) for one in sessions]), count))
session = engine.session()
found = {"load_ms": 1e3 * seconds(lambda: engine.load(None))}
session.step(PROMPT[:16])
found["decode"] = max(decode(session, 16, 200) for _ in range(2))
def prefill(): session.reset(); session.step(PROMPT[:241])
found["prefill"] = 241 / min(seconds(prefill) for _ in range(3))
found["decode_1000"] = decode(session, 1000, 200)
for name, key in ((adapter, "float32"), (adapter8, "8bit")):
    found[f"adapter_{key}_load_ms"] = 1e3 * seconds(lambda: engine.load(name))
    used = engine.session(name)
    found[f"decode_{key}"] = max(decode(used, 16, 200) for _ in range(2))
    found[f"prefill_{key}"] = 241 / min(seconds(lambda: (used.reset(), used.step(PROMPT[:241]))) for _ in range(3))
sessions = {"base": session, "float32": engine.session(adapter), "8bit": engine.session(adapter8)}
steps = {name: [] for name in sessions}
for _ in range(100):  # in turns, so that what else the machine does hits all alike
    for name, one in sessions.items():
        one.reset(); one.step(PROMPT[:16])
        steps[name] += [seconds(lambda: one.step([PROMPT[i]])) for i in range(8)]
quartile = {name: sorted(times)[len(times) // 4] for name, times in steps.items()}
for key in ("float32", "8bit"): found[f"decode_{key}_ratio"] = quartile["base"] / quartile[key]
eight = [None] * 8
for key, names in (("base", eight), ("float32", [adapter] * 8), ("8bit", [adapter8] * 8)):
    found[f"decode_8_{key}"] = max(batch(names) for _ in range(2))
found["decode_8_mixed"] = max(batch([None, adapter, adapter8, None] * 2) for _ in range(2))
session.reset()
found["switch_ms"] = 1e3 * min(seconds(lambda: session.use(name)) for name in (adapter, adapter8) * 50)
print(json.dumps(found))
"""
# What an adapter takes beside a base that has run: when it is loaded, and with what its first steps want.
BEDPLATE_ADAPTER = """
import bedplate
path, adapter = sys.argv[1:]
engine = bedplate.Engine(bedplate.Bundle.open(path, check=False), threads=2)
def use(name):
    session = engine.session(name)
    session.step(PROMPT[:241])
    for token in PROMPT[:20]: session.step([token])
use(None)
before = resident()
engine.load(adapter)
loaded = resident()
use(adapter)
print(json.dumps({"load_mb": loaded - before, "mb": resident() - before}))
"""
STOCK = """
import torch, executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.pybindings.portable_lib import _load_for_executorch
torch.set_num_threads(2)
program, data = sys.argv[1:]
module = _load_for_executorch(program, data or None)
def step(tokens, position):
    module.run_method("forward", (torch.tensor([tokens]), torch.tensor([position])))
def fill(count):
    for at in range(0, count, 128): step(PROMPT[at:min(at + 128, count)], at)
def decode(start, count):
    fill(start)
    positions = iter(range(start, start + count))
    return speed(moments(lambda token: step([token], next(positions)), count))
found = {"decode": max(decode(16, 200) for _ in range(2))}
found["prefill"] = 241 / min(seconds(lambda: fill(241)) for _ in range(3))
found["decode_1000"] = decode(1000, 200)
print(json.dumps(found))
"""
LLAMA_CPP = """
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=2, n_threads_batch=2, n_batch=256, verbose=False)
def decode(start, count):
    model.reset(); model.eval(PROMPT[:start])
    return speed(moments(lambda token: model.eval([token]), count))
found = {"decode": max(decode(16, 200) for _ in range(2))}
def prefill(): model.reset(); model.eval(PROMPT[:241])
found["prefill"] = 241 / min(seconds(prefill) for _ in range(3))
found["decode_1000"] = decode(1000, 200)
print(json.dumps(found))
"""
OPENVINO = """
import numpy, openvino, openvino_genai as genai
pipe = genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=2, ATTENTION_BACKEND="SDPA")
def run(start, count):
    config = genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True)
    tokens, mask = numpy.array([PROMPT[:start]], numpy.int64), numpy.ones((1, start), numpy.int64)
    inputs = genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(mask))
    return pipe.generate(inputs, config).perf_metrics
def decode(start):
    return speed([moment / 1e3 for moment in run(start, 200).raw_metrics.m_new_token_times])
run(16, 2)
found = {"decode": max(decode(16) for _ in range(2))}
found["prefill"] = 241e3 / min(run(241, 2).get_ttft().mean for _ in range(3))
found["decode_1000"] = decode(1000)
print(json.dumps(found))
"""
# What a user waits for and pays: from the start of the process to one token, and after 200 more.
GENERATION = """
def first(): print(time.clock_gettime(time.CLOCK_MONOTONIC))  # of the machine: the same in all processes
def last(): print(resident())
"""
BEDPLATE_GENERATES = """
import bedplate
engine = bedplate.Engine(bedplate.Bundle.open(sys.argv[1], check=False), threads=2)
session = engine.session()
session.generate("Hello", max_tokens=1)
first()
session.generate("Once upon a time there was a", max_tokens=200)
assert session.last.generated_tokens == 200
last()
"""
STOCK_GENERATES = """
import torch, executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.pybindings.portable_lib import _load_for_executorch
torch.set_num_threads(2)
module = _load_for_executorch(sys.argv[1])
def step(token, position): module.run_method("forward", (torch.tensor([[token]]), torch.tensor([position])))
step(PROMPT[0], 0)
first()
for i in range(208): step(PROMPT[i], i)
last()
"""
LLAMA_CPP_GENERATES = """
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=2, n_threads_batch=2, n_batch=256, verbose=False)
model.create_completion("Hello", max_tokens=1)
first()
assert model.create_completion("Once upon a time there was a", max_tokens=200)["usage"]["completion_tokens"] == 200
last()
"""
OPENVINO_GENERATES = """
import openvino_genai as genai
pipe = genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_NUM_THREADS=2, ATTENTION_BACKEND="SDPA")
pipe.generate("Hello", max_new_tokens=1)
first()
pipe.generate("Once upon a time there was a", max_new_tokens=200, ignore_eos=True)
last()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--adapter8", required=True)
    parser.add_argument("--machine", required=True, help="in a few words: figures are kept by it")
    parser.add_argument("--stock", type=Path, help="a program of ExecuTorch's export_llm")
    parser.add_argument("--other", type=Path, help="python of an environment with llama.cpp and OpenVINO")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--openvino", type=Path)
    options = parser.parse_args()
    bundle = options.bundle.absolute()
    ours, other = sys.executable, str(options.other)
    systems: dict[str, list[str]] = {
        "bedplate": [ours, BEDPLATE, str(bundle), options.adapter, options.adapter8],
    }
    if (bundle / "base.pte").exists():
        files = (str(bundle / "base.pte"), str(bundle / "foundation.ptd"))
        systems["ExecuTorch's runtime, bedplate's files"] = [ours, STOCK, *files]
    generators: dict[str, list[str]] = {
        "bedplate": [ours, BEDPLATE_GENERATES, str(bundle)],
    }
    if options.stock:
        name = "ExecuTorch's export_llm and runtime"
        systems[name] = [ours, STOCK, str(options.stock), ""]
        generators[name] = [ours, STOCK_GENERATES, str(options.stock)]
    if options.gguf:
        systems["llama.cpp Q4_0"] = [other, LLAMA_CPP, str(options.gguf)]
        generators["llama.cpp Q4_0"] = [other, LLAMA_CPP_GENERATES, str(options.gguf)]
    if options.openvino:
        systems["OpenVINO int4"] = [other, OPENVINO, str(options.openvino)]
        generators["OpenVINO int4"] = [other, OPENVINO_GENERATES, str(options.openvino)]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for number in range(ROUNDS):
        for name, (python, script, *arguments) in systems.items():
            print(f"round {number + 1}: {name} …", file=sys.stderr, flush=True)
            rounds[name].append(figures(python, script, arguments))
    rows = {name: best(found) for name, found in rounds.items()}
    for key, name in (("float32", options.adapter), ("8bit", options.adapter8)):
        found = best([figures(ours, BEDPLATE_ADAPTER, [str(bundle), name]) for _ in range(ROUNDS)])
        rows["bedplate"] |= {f"adapter_{key}_{figure}": value for figure, value in found.items()}
    for name, found in generations(generators).items():
        rows.setdefault(name, {}).update(found)
    file = Path(__file__).parent / "runtime.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[options.machine] = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
    file.write_text(json.dumps(results, indent=2) + "\n")
    print_table(rows)


def figures(python: str, script: str, arguments: list[str]) -> dict[str, float]:
    found = json.loads(output(python, COMMON + script, arguments)[-1])
    return {name: float(value) for name, value in found.items()}


def output(python: str, script: str, arguments: list[str]) -> list[str]:
    """Lines that a process prints which runs `script` in a folder of its own."""
    words = [python, "-W", "ignore", "-c", script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed, modules are compiled once
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.splitlines()


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure the best: the highest speed, the lowest time and memory."""
    pick = {name: min if name.endswith(("_ms", "mb")) else max for name in rounds[0]}
    return {name: pick[name](found[name] for found in rounds) for name in rounds[0]}


def generations(systems: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Milliseconds from the start of a process to its first token, and its resident MB 200 tokens later."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for number in range(GENERATIONS + 1):
        for name, (python, script, *arguments) in systems.items():
            start = time.clock_gettime(time.CLOCK_MONOTONIC)
            first, resident = map(float, output(python, COMMON + GENERATION + script, arguments)[-2:])
            if number:  # the first time, files are read from the disk
                found[name].append({"first_token_ms": 1e3 * (first - start), "generated_mb": resident})
    return {name: best(rounds) for name, rounds in found.items()}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    print(f"| | {' | '.join(rows)} |\n|---|{'---|' * len(rows)}")
    for figure in dict.fromkeys(figure for row in rows.values() for figure in row):
        cells = (f"{row[figure]:,.3g}" if figure in row else "–" for row in rows.values())
        print(f"| {figure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
