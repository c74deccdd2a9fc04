"""A process that packs adapters for another one, which need not import what packing imports.

`python -m bedplate.assemble.packer` reads requests, a line of JSON each, and answers each with a line. It ends with
its input, so at the latest with the process that started it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from bedplate.bundle import files, manifest
from bedplate.bundle.store import Bundle
from bedplate.errors import BedplateError


def pack(bundle: Path, source: Path, name: str, staging: Path) -> None:
    """Pack an adapter against a bundle's foundation, as the only adapter of a bundle at `staging`, an empty folder.
    What it has of the other bundle are links.
    """
    # What is not installed is told in an answer.
    from bedplate.assemble.add import add_adapters
    from bedplate.assemble.adding import Adding
    from bedplate.assemble.report import SILENT
    from bedplate.compile.cache import UnitCache

    whole = Bundle.open(bundle, check=False)
    needed = set(whole.manifest.files) - {*manifest.BASE_PROGRAMS.values()}
    for file in needed:
        (staging / file).symlink_to((bundle / file).resolve())
    document = dataclasses.replace(
        whole.manifest, files={file: whole.manifest.files[file] for file in sorted(needed)}, adapters={}
    )
    files.write(staging / manifest.MANIFEST, manifest.dump(document))
    # Whoever asked compares it with the base: that needs the foundation, which it has in memory.
    adding = Adding(
        exact_rank=False,
        allow_noop=True,
        programs=False,
        check_base=False,
        cache=UnitCache(None),
        reporter=SILENT,
    )
    add_adapters(Bundle.open(staging, check=False), {name: source}, quantize=None, adding=adding)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        pack(Path(request["bundle"]), Path(request["source"]), request["name"], Path(request["staging"]))
    except BedplateError as error:
        return {"what": error.what, "hint": error.hint}
    except ModuleNotFoundError as error:
        return {"what": f"the package {error.name} is not installed", "hint": "pip install 'bedplate[build]'"}
    except Exception as error:  # the next one can be good
        return {"what": f"it cannot be read: {type(error).__name__}", "hint": None}
    return {}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
