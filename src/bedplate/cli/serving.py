"""`bedplate serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bedplate.bundle.store import Bundle
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

    opened = [Bundle.open(bundle, check=not no_check) for bundle in bundles]
    settings = Settings(host=host, port=port)
    bases = [
        Base(name, Engine(bundle, threads=threads, kv=kv, max_context=max_context))
        for name, bundle in zip(names_of(bundles), opened, strict=True)
    ]
    app.serve(bases, settings)
