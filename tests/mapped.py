"""What this process has mapped of a file."""

from __future__ import annotations

import re
from pathlib import Path


def resident_of(file: Path) -> list[int]:
    """Bytes in memory, of each mapping of the file."""
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags")
    return [
        1024 * int(re.findall(r"^Rss: +(\d+) kB", text, re.MULTILINE)[-1])
        for text in mappings
        if str(file) in text
    ]
