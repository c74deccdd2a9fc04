"""What four bits lose and what corrections give back: quality on held-out text, bytes, and decode speed.

    python benchmarks/recovery.py MODEL TEXT --name NAME [--calibration FILE] [--quality]

Builds a bundle for each recipe and runs `bedplate.evaluate` on TEXT, which no calibration may have seen: in bedplate's
runtime, and its program in ExecuTorch's. --quality leaves out programs and speed. For decode speed the bundles take
turns every few tokens; a quarter of a bundle's steps are faster than what is told. Prints a Markdown table, writes the
figures under NAME into recovery.json beside this file, and draws the models of that file with speeds as
docs/recovery.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import bedplate

STOCK = "8da4w hqq everywhere"
RECIPES: dict[str, dict[str, Any]] = {
    STOCK: {"method": "hqq", "head": "8da4w", "embedding": "4", "recovery_rank": 0},
    "hqq": {"method": "hqq", "recovery_rank": 0},
    "hqq, rank 16": {"method": "hqq", "recovery_rank": 16},
    "offset": {"method": "offset", "recovery_rank": 0},
    "offset, rank 16": {"method": "offset", "recovery_rank": 16},
    "8da8w": {"quantize": "8da8w"},
}
ROUNDS, DECODED = 150, 8
SEQUENCE = 512  # tokens that evaluation reads at once
HERE = Path(__file__).parent
COLORS = ("#1f6feb", "#d1242f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for number, (name, recipe) in enumerate(RECIPES.items()):
            out = Path(folder) / f"{number}.bundle"
            bundles[name] = bedplate.build(
                options.model,
                out,
                calibration=options.calibration,
                max_context=SEQUENCE,
                programs=not options.quality,
                **recipe,
            )
            rows[name] = quality(bundles[name], options.model, options.text)
            print(name, rows[name], flush=True)
        speeds = {} if options.quality else decode_speeds(bundles)
        for name, speed in speeds.items():
            rows[name]["decode_tokens_per_second"] = speed
    file = HERE / "recovery.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results[options.name] = {"date": time.strftime("%Y-%m-%d"), "rows": rows}
    file.write_text(json.dumps(results, indent=2) + "\n")
    drawn = {
        name: result
        for name, result in results.items()
        if "decode_tokens_per_second" in result["rows"][STOCK]
    }
    (HERE.parent / "docs" / "recovery.svg").write_text(plot(drawn))
    print_table(rows)


def quality(bundle: bedplate.Bundle, model: Path, text: Path) -> dict[str, float]:
    """What the recipe loses against the float model."""
    (ours,) = bedplate.evaluate(bundle, model, text)
    row = {
        "foundation_bytes": bundle.foundation.stat().st_size,
        "positions": ours.positions,
        "float_nll": ours.float_nll,
        "nll_loss": ours.nll - ours.float_nll,
        "mean_kl": ours.mean_kl,
        "top1": ours.top1,
    }
    if bundle.base_program is None:
        return row
    (program,) = bedplate.evaluate(bundle, model, text, programs=True)
    return row | {
        "program_nll_loss": program.nll - program.float_nll,
        "program_mean_kl": program.mean_kl,
        "program_top1": program.top1,
    }


def decode_speeds(bundles: dict[str, bedplate.Bundle]) -> dict[str, float]:
    """Tokens/s. The machine's other load comes and goes; that all take turns makes it hit all alike."""
    engines = {name: bedplate.Engine(bundle) for name, bundle in bundles.items()}
    sessions = {name: engine.session() for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in bundles}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            session.reset()
            session.step([5] * 16)
            for token in range(DECODED):
                start = time.perf_counter()
                session.step([token + 5])
                seconds[name].append(time.perf_counter() - start)
    return {name: 1 / sorted(times)[len(times) // 4] for name, times in seconds.items()}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    stock = rows[STOCK]
    print(
        "| recipe | NLL above float | mean KL | top-1 kept | KL ÷ the program's | foundation MB | decode, relative |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        program = speed = "–"
        if "program_mean_kl" in row:
            program = f"{row['mean_kl'] / row['program_mean_kl']:.2f}"
        if "decode_tokens_per_second" in row:
            speed = f"{row['decode_tokens_per_second'] / stock['decode_tokens_per_second']:.2f}"
        print(
            f"| {name} | {row['nll_loss']:.4f} | {row['mean_kl']:.4f} | {row['top1']:.1%} | {program} "
            f"| {row['foundation_bytes'] / 1e6:.1f} | {speed} |"
        )


def plot(results: dict[str, Any]) -> str:
    """Mean KL against bytes, both relative to the stock recipe, on axes from 0."""
    width, height, margin = 640, 400, 60
    right, top = 1.6, 1.05

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (width - 2 * margin) / right, (height - 2 * margin) / top
        return margin + x * across, height - margin - y * up

    drawn = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for tick in (0.0, 0.5, 1.0, 1.5):
        x, y = at(tick, 0)
        drawn.append(label(x, y + 18, f"{tick:g}", anchor="middle"))
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = at(0, tick)
        drawn += [f'<path d="M{x:.0f} {y:.0f}H{width - margin}" stroke="#ddd"/>']
        drawn += [label(x - 8, y + 4, f"{tick:g}", anchor="end")]
    x, y = at(right / 2, 0)
    drawn.append(label(x, y + 40, f"foundation bytes, {STOCK} = 1", anchor="middle"))
    drawn.append(label(margin, 24, f"mean KL to the float model, {STOCK} = 1"))
    for color, (number, (model, result)) in zip(COLORS, enumerate(results.items()), strict=False):
        stock = result["rows"][STOCK]
        drawn.append(label(width - margin, 24 + 16 * number, model, color=color, anchor="end"))
        for name, row in result["rows"].items():
            x, y = at(row["foundation_bytes"] / stock["foundation_bytes"], row["mean_kl"] / stock["mean_kl"])
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
            drawn.append(label(x + 7, y - 4, name, color=color))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return "\n".join([f'{opening} font-family="sans-serif" font-size="11">', *drawn, "</svg>"]) + "\n"


def label(x: float, y: float, text: str, *, color: str = "#222", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    main()
