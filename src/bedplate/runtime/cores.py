"""How many threads compute a step, if nobody says so."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Cores that this process may use; hardware threads of one share its arithmetic, so count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package, core = ((topology / file).read_text() for file in ("physical_package_id", "core_id"))
        except OSError:
            package, core = "", str(cpu)
        cores.add((package, core))
    return len(cores)
