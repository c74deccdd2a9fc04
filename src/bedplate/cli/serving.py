"""`bedplate serve`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bedplate.bundle.overlay import Overlay
from bedplate.cli.options import KvPrecision, MaxContext, NoCheck, Threads
from bedplate.errors import RunError
from bedplate.serve.settings import Settings

if TYPE_CHECKING:
    from bedplate.serve.keys import Keys

_DEFAULT = Settings()


def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders of bundles.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = _DEFAULT.host,
    port: Annotated[int, typer.Option(help="Port to listen at. 0: any free one.")] = _DEFAULT.port,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, KEY or NAME=KEY on each line.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve other machines without API keys.")
    ] = False,
    allow_origin: Annotated[
        list[str], typer.Option(help="Allow scripts of pages of this origin (https://…; *: of any).")
    ] = [],  # noqa: B006 — typer copies it
    max_running: Annotated[int, typer.Option(min=1, help="Answers at once.")] = _DEFAULT.max_running,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait.")] = _DEFAULT.max_queue,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds for a request, with its wait.")
    ] = _DEFAULT.timeout,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = _DEFAULT.max_body,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens a minute for each API key, or for each model.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for running answers when the server is told to end.")
    ] = _DEFAULT.drain,
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

    opened = [Overlay.open(bundle, check=not no_check) for bundle in bundles]
    settings = Settings(
        host=host,
        port=port,
        keys=_keys(api_key_file),
        insecure=insecure,
        allow_origins=tuple(allow_origin),
        max_running=max_running,
        max_queue=max_queue,
        timeout=timeout,
        max_body=max_body,
        max_prompt=max_prompt,
        max_tokens=max_tokens,
        tokens_per_minute=tokens_per_minute,
        drain=drain,
        allow_adapters_from=tuple(allow_adapters_from or ()),
        max_adapters=max_adapters,
        watch=watch,
    )
    memory_bytes = None if memory is None else _bytes(memory)
    bases = [
        Base(
            name,
            Engine(
                bundle,
                threads=threads,
                kv=kv,
                max_context=max_context,
                memory_bytes=memory_bytes,
                guard_templates=True,
            ),
        )
        for name, bundle in zip(names_of(bundles), opened, strict=True)
    ]
    app.serve(bases, settings)


def _keys(file: Path | None) -> Keys | None:
    from bedplate.serve.keys import VARIABLE, Keys

    if file is not None:
        return Keys.of_file(file)
    given = os.environ.get(VARIABLE)
    return None if given is None else Keys.of(given.split(","))


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
