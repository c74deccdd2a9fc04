"""OpenVINO GenAI: run_openvino.py speeds WINDOW TURNS FOLDER | start FOLDER TOKENS"""

from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
import timing
from timing import PROMPT


def open_pipeline(path: str) -> Any:
    return genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=timing.THREADS, ATTENTION_BACKEND="SDPA")


def speeds(path: str, window: int, turns: int) -> dict[str, float]:
    pipeline = open_pipeline(path)

    def run(position: int, count: int) -> Any:
        config = genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True)
        tokens, mask = np.array([PROMPT[:position]], np.int64), np.ones((1, position), np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(mask))
        return pipeline.generate(inputs, config).perf_metrics

    def decode(position: int) -> float:
        times = run(position, window * turns + 1).raw_metrics.m_new_token_times
        return timing.fastest([moment / 1e3 for moment in times], window)

    run(16, 2)
    prefill = 241e3 / min(run(241, 2).get_ttft().mean for _ in range(2))
    return {"prefill": prefill, "decode": decode(16), "decode_800": decode(800)}


def start(path: str, tokens: int) -> dict[str, float]:
    pipeline = open_pipeline(path)
    pipeline.generate("Hello", max_new_tokens=1)
    found = {"first_token": timing.now()}
    if tokens:
        pipeline.generate("Once upon a time there was a", max_new_tokens=tokens, ignore_eos=True)
    return {**found, "resident_mb": timing.resident_mb()}


if __name__ == "__main__":
    timing.main(start, speeds)
