"""Resident memory of one process as base and adapters load.

    python benchmarks/memory.py BUNDLE

Prints a Markdown table, in which the engine says how large weights are, and writes memory.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

MEASURE = """
import json, sys
from bedplate import Bundle, Engine
engine = Engine(Bundle.open(sys.argv[1], check=False))
memory = engine.memory()
rows = [{"loaded": "nothing", "process": memory.process, "weights": 0}]
for name in (None, *engine.bundle.adapters):
    session = engine.session(name)
    session.generate("The", max_tokens=4)
    session.reset()
    memory = engine.memory()
    weights = memory.adapters[name] if name else memory.foundation
    rows.append({"loaded": name or "base", "process": memory.process, "weights": weights})
print(json.dumps(rows))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    command = [sys.executable, "-c", MEASURE, str(parser.parse_args().bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    (Path(__file__).parent / "memory.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("| loaded | process, MB | its weights, MB |\n|---|---|---|")
    for row in rows:
        print(f"| {row['loaded']} | {row['process'] / 1e6:.1f} | {row['weights'] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
