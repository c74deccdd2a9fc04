"""Recipes side by side: quality against the float model, bytes, and decode speed, of the program as it runs.

    python benchmarks/recipes.py MODEL TEXT

Prints a Markdown table and writes recipes.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bedplate

RECIPES: dict[str, dict[str, Any]] = {
    "none": {"quantize": "none"},
    "8da8w": {"quantize": "8da8w"},
    "8da4w, all of it, plain": {"quantize": "8da4w", "method": "plain", "head": "8da4w", "embedding": "4"},
    "8da4w, all of it, hqq": {"quantize": "8da4w", "head": "8da4w", "embedding": "4"},
    "8da4w, head and embedding 8": {"quantize": "8da4w"},
    "8da4w, head, embedding, down_proj 8": {
        "quantize": "8da4w",
        "overrides": {"layers.*.mlp.down_proj": "8da8w"},
    },
}
DECODED, ROUNDS = 128, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--unit-cache", type=Path, default=None)
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    rows: list[dict[str, Any]] = []
    reference: NDArray[np.float64] | None = None
    with tempfile.TemporaryDirectory() as folder:
        bundles: list[bedplate.Bundle] = []
        for name, recipe in RECIPES.items():
            out = Path(folder) / f"{len(bundles)}.bundle"
            bundle = bedplate.build(options.model, out, unit_cache=options.unit_cache, **recipe)
            bundles.append(bundle)
            with bedplate.Engine(bundle) as engine:
                tokens = engine.tokenizer.encode(text)
                log_q = log_softmax(engine.session().logits(tokens))
            reference = log_q if reference is None else reference
            rows.append(measure(name, reference, log_q, tokens, bundle.foundation.stat().st_size))
        for row, speed in zip(rows, decode_speeds(bundles, tokens[:32]), strict=True):
            row["decode_tokens_per_second"] = speed
    (Path(__file__).parent / "recipes.json").write_text(json.dumps(rows, indent=2) + "\n")
    print_table(rows)


def measure(
    name: str,
    log_p: NDArray[np.float64],
    log_q: NDArray[np.float64],
    tokens: list[int],
    nbytes: int,
) -> dict[str, Any]:
    """Mean KL and top-1 agreement with the float program, and the text's own negative log-likelihood."""
    return {
        "recipe": name,
        "mean_kl": float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
        "top1_kept": float((log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean()),
        "nll": float(-log_q[np.arange(len(tokens) - 1), tokens[1:]].mean()),
        "positions": len(tokens),
        "foundation_bytes": nbytes,
    }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def decode_speeds(bundles: list[bedplate.Bundle], prompt: list[int]) -> list[float]:
    """Tokens a second of each, the best of several rounds over all: what else the machine does only takes away."""
    best = [0.0] * len(bundles)
    for _ in range(ROUNDS):
        for index, bundle in enumerate(bundles):
            with bedplate.Engine(bundle) as engine:
                session = engine.session()
                token = int(session.step(prompt).argmax())
                start = time.perf_counter()
                for _ in range(DECODED):
                    token = int(session.step([token]).argmax())
                best[index] = max(best[index], DECODED / (time.perf_counter() - start))
    return best


def print_table(rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if row["recipe"] == "8da4w, head and embedding 8")
    print("| recipe | mean KL | top-1 kept | NLL | foundation MB | decode, relative |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        relative = row["decode_tokens_per_second"] / base["decode_tokens_per_second"]
        print(
            f"| {row['recipe']} | {row['mean_kl']:.3f} | {row['top1_kept']:.2f} | {row['nll']:.3f} "
            f"| {row['foundation_bytes'] / 1e6:.1f} | {relative:.2f} |"
        )


if __name__ == "__main__":
    main()
