"""llama.cpp: run_llama_cpp.py speeds WINDOW TURNS GGUF | start GGUF TOKENS"""

from collections.abc import Sequence

import timing
from llama_cpp import Llama


def open_model(path: str) -> Llama:
    return Llama(
        path,
        n_ctx=2048,
        n_batch=256,
        flash_attn=True,  # here a tenth faster
        n_threads=timing.THREADS,
        n_threads_batch=timing.THREADS,
        verbose=False,
    )


def speeds(path: str, window: int, turns: int) -> dict[str, float]:
    model = open_model(path)

    def fill(tokens: Sequence[int]) -> None:
        model.reset()
        model.eval(tokens)

    return timing.speeds(fill, lambda token: model.eval([token]), window, turns)


def start(path: str, tokens: int) -> dict[str, float]:
    model = open_model(path)
    model.create_completion("Hello", max_tokens=1)
    found = {"first_token": timing.now()}
    if tokens:
        done = model.create_completion("Once upon a time there was a", max_tokens=tokens)
        assert done["usage"]["completion_tokens"] == tokens
    return {**found, "resident_mb": timing.resident_mb()}


if __name__ == "__main__":
    timing.main(start, speeds)
