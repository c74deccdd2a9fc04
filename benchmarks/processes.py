"""How long a process takes, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A small process between, for a process starts with the peak of the one that it comes from. Files that are mapped, as
# safetensors are, count as resident memory, but the system can take their pages back. What it cannot take back is
# anonymous. The system keeps no peak of it, so a thread looks a hundred times a second.
LAUNCHER = """
import json, os, subprocess, sys, threading, time
from pathlib import Path
anonymous = 0

def watch(status):
    global anonymous
    while True:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
        if not found:
            return
        anonymous = max(anonymous, *found)
        time.sleep(0.01)

start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
threading.Thread(target=watch, args=[Path(f"/proc/{process.pid}/status")], daemon=True).start()
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss, anonymous]))
sys.exit(os.waitstatus_to_exitcode(status))
"""
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


def measured(command: Sequence[object], folder: Path) -> dict[str, float]:
    """Of a process in `folder`: seconds, peak of resident memory, and peak of what of it is anonymous (0: not known).

    Memory in MB of 10^6 bytes. CalledProcessError: it failed.
    """
    words = [sys.executable, "-c", LAUNCHER, *map(str, command)]
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)  # as users have it: all cores
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed, modules are compiled once
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.stderr.write(done.stderr[-3000:])
        raise subprocess.CalledProcessError(done.returncode, words)
    seconds, peak, anonymous = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": round(seconds, 2),
        "peak_mb": round(peak * PEAK_UNIT / 1e6),
        "anonymous_mb": round(anonymous * 1024 / 1e6),
    }
