"""How many threads compute a step, if nobody says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(*, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Cores that this process may use, and has the time of.

    cgroups: where the system shows groups of processes, which can have a quota of processor time, as containers do.
    own: the file that says which groups this process is in.
    """
    # A part of a core counts as one: two threads with a quota of 1.5 cores do more than one does.
    return min([physical_cores(), *map(ceil, _quotas(cgroups, own))])


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


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """Cores' worth of time that the groups of this process give it: its own, and all those around it."""
    for line in _read(own).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:  # cgroup v2, alone or beside v1
            roots, quota = [cgroups, cgroups / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            roots, quota = [cgroups / controllers, cgroups / "cpu"], _quota_v1
        else:
            continue
        # In a container, the path can be that of the machine, whose folders are not there: then the root is its own.
        inside = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        for folder in (root / group for root in roots for group in (inside, *inside.parents)):
            found = quota(folder)
            if found is not None:
                yield found


def _quota_v2(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.max").split())


def _quota_v1(folder: Path) -> float | None:
    return _ratio([_read(folder / file) for file in ("cpu.cfs_quota_us", "cpu.cfs_period_us")])


def _ratio(texts: list[str]) -> float | None:
    """None: there is no quota ("max", or -1), or the files are not there."""
    try:
        quota, period = map(int, texts)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
