"""`bedplate serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from bedplate.bundle.overlay import Overlay
from bedplate.cli.options import KvPrecision, MaxContext, NoCheck, Threads
from bedplate.errors import RunError


def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at. 0: any free one.")] = 8080,
    threads: Threads = None,
    kv: KvPrecision = "float16",
    max_context: MaxContext = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for adapters, keys and values together, of each bundle: 4GB, 500MB. Without this option: no "
            "limit.",
        ),
    ] = None,
    allow_adapters_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|URL",
            help="Let clients load adapters from this folder, or from URLs that begin so. You can give this option "
            "more than once.",
        ),
    ] = None,
    max_adapters: Annotated[
        int, typer.Option(min=0, help="How many adapters clients can load, for each bundle.")
    ] = 256,
    watch: Annotated[
        bool, typer.Option("--watch", help="See what `bedplate add` and `bedplate remove` do meanwhile.")
    ] = False,
    no_check: NoCheck = False,
) -> None:
    """Serve bundles over HTTP, with the API of OpenAI. Each adapter is a model."""
    try:
        from bedplate.serve import app
    except ModuleNotFoundError as error:
        hint = "pip install 'bedplate[serve]'"
        raise RunError(f"the package {error.name} is not installed", hint=hint) from error
    from bedplate.runtime.engine import Engine
    from bedplate.serve.catalog import Base, names_of
    from bedplate.serve.settings import Settings

    opened = [Overlay.open(bundle, check=not no_check) for bundle in bundles]
    settings = Settings(
        host=host,
        port=port,
        allow_adapters_from=tuple(allow_adapters_from or ()),
        max_adapters=max_adapters,
        watch=watch,
    )
    memory_bytes = None if memory is None else _bytes(memory)
    bases = [
        Base(name, Engine(bundle, threads=threads, kv=kv, max_context=max_context, memory_bytes=memory_bytes))
        for name, bundle in zip(names_of(bundles), opened, strict=True)
    ]
    app.serve(bases, settings)


_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def _bytes(text: str) -> int:
    """A size as a person writes it: `4GB`, `1.5 GiB`, `500000000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    unit = None if found is None else _UNITS.get(found[2])
    if found is None or unit is None:
        raise RunError(f"--memory has {text!r}", hint="write 4GB, 500MB or 1.5GiB")
    return int(float(found[1]) * unit)
