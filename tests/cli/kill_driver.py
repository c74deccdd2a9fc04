"""A process that runs commands in forks of itself and kills each at its n-th touch of a folder.

One JSON line in, {"argv", "folder", "kill_at"}; one out, {"code", "touches"}. A touch is any event by which Python's
audit hooks tell of a file or folder: open, rename, mkdir, remove … What takes long to import is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import repeat
from typing import Any

from bedplate.assemble.report import SILENT, load_exporter
from bedplate.cli.main import main

load_exporter(SILENT)


def run(argv: list[str], folder: str, kill_at: int | None) -> dict[str, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        touches = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal touches
            named = [os.fsdecode(a) for a in args if isinstance(a, str | bytes | os.PathLike)]
            if event.startswith(("open", "os.", "shutil.")) and any(
                map(str.startswith, named, repeat(folder))
            ):
                touches += 1
                if touches == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        sys.argv = ["bedplate", *argv]
        try:
            main()
        except SystemExit as end:
            os.write(writer, touches.to_bytes(8, "little"))
            os._exit(int(end.code or 0))
        os._exit(70)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as told:
        count = int.from_bytes(told.read(8), "little")
    return {"code": os.waitstatus_to_exitcode(status), "touches": count}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
