"""Resident memory of one process as base and adapters load, with XNNPACK's weight cache on and off.

    python benchmarks/memory.py BUNDLE

Each setting runs in a process of its own. Prints a Markdown table and writes memory.json beside this file.
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
from bedplate.runtime.programs import resident_bytes
engine = Engine(Bundle.open(sys.argv[1]), weight_cache=sys.argv[2] == "on")
rows = {"empty": resident_bytes()}
for name in (None, *engine.bundle.adapters):
    engine.session(name).generate("The", max_tokens=4)
    rows[name or "base"] = resident_bytes()
print(json.dumps(rows))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    result: dict[str, dict[str, int]] = {}
    for cache in ("on", "off"):
        command = [sys.executable, "-c", MEASURE, str(bundle), cache]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result[cache] = json.loads(done.stdout)
    (Path(__file__).parent / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    print("| resident MB after loading | weight cache on | off |")
    print("|---|---|---|")
    for name in result["on"]:
        print(f"| {name} | {result['on'][name] / 1e6:.0f} | {result['off'][name] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
