"""What every system is timed with. Each script of this folder measures one system, in a process of its own.

It reads what to measure and of which files, and prints one JSON object of figures: speeds in tokens/s, times in ms,
memory in MB of 10^6 bytes. All systems get the same tokens.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

THREADS = 2
PROMPT = [(i * 7919) % 40000 + 100 for i in range(1100)]
Fill = Callable[[Sequence[int]], object]  # begin a new text with these tokens
Step = Callable[[int], object]  # the next token


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest(moments: Sequence[float], window: int) -> float:
    """Tokens/s of the fastest `window` tokens in a row. What else the machine does comes in bursts.

    moments: when each token was there, in seconds.
    """
    return max(window / (end - start) for start, end in zip(moments, moments[window:], strict=False))


def decode(step: Step, window: int, turns: int) -> float:
    moments = [time.perf_counter()]
    for token in PROMPT[: window * turns]:
        step(token)
        moments.append(time.perf_counter())
    return fastest(moments, window)


def speeds(fill: Fill, step: Step, window: int, turns: int) -> dict[str, float]:
    fill(PROMPT[:16])
    prefill = 241 / min(seconds(lambda: fill(PROMPT[:241])) for _ in range(2))
    fill(PROMPT[:16])
    early = decode(step, window, turns)
    fill(PROMPT[:800])
    return {"prefill": prefill, "decode": early, "decode_800": decode(step, window, turns)}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def now() -> float:
    """Seconds on the machine's clock, which is the same in all processes."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def main(
    start: Callable[[str, int], dict[str, float]], speeds: Callable[[str, int, int], dict[str, float]]
) -> None:
    """Of a peer: `start FILE TOKENS` or `speeds WINDOW TURNS FILE`."""
    what, *words = sys.argv[1:]
    if what == "start":
        tell(start(words[0], int(words[1])))
    else:
        tell(speeds(words[2], int(words[0]), int(words[1])))


def tell(figures: dict[str, float]) -> None:
    print(json.dumps(figures))
