"""Commands that run a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bedplate.bundle.store import Bundle
from bedplate.cli.options import (
    Adapter,
    BundlePath,
    KvPrecision,
    MaxContext,
    NoCheck,
    Scale,
    System,
    Threads,
    with_generation,
)
from bedplate.cli.output import print_json, show_prefill
from bedplate.cli.reading import check_texts, decode, standard_input
from bedplate.errors import RunError


@with_generation(max_tokens=256)
def run(
    bundle: BundlePath,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question. -: read it from stdin.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", metavar="FILE", help="Answer each line of this file, many at once. -: lines of stdin."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where answers of --file go. Without this option: stdout."),
    ] = None,
    parallel: Annotated[int, typer.Option(metavar="N", help="How many lines of --file at once.")] = 16,
    adapter: Adapter = None,
    scale: Scale = 1.0,
    generation: dict[str, Any],
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")
    ] = False,
    threads: Threads = None,
    kv: KvPrecision = "float16",
    max_context: MaxContext = None,
    no_check: NoCheck = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and statistics as JSON.")] = False,
) -> None:
    """Answer one prompt, or each line of a file. The text goes to stdout while it is made. Statistics go to stderr."""
    from bedplate.cli.batch import run_file
    from bedplate.cli.requests import Defaults, turns
    from bedplate.cli.talk import print_speed, stream
    from bedplate.runtime.engine import Engine

    check_texts({"--prompt": prompt, "--system": system})
    if (prompt is None) == (file is None):
        raise RunError("there must be one prompt", hint="give -p PROMPT or --file FILE, and not both")
    if output is not None and file is None:
        raise RunError("--output without --file", hint="give --file FILE, or use `> FILE`")
    text = decode(standard_input().read()) if prompt == "-" else prompt
    opened = Bundle.open(bundle, check=not no_check)
    with Engine(opened, threads=threads, kv=kv, max_context=max_context) as engine:
        session = engine.session(adapter)
        if scale != 1:
            session.use(adapter, scale=scale)
        if file is not None:
            defaults = Defaults(adapter=adapter, scale=scale, system=system, raw=raw, generation=generation)
            key = repr((opened.manifest, defaults, kv, max_context)).encode(errors="backslashreplace")
            run_file(engine, file, output, defaults, parallel=parallel, key=key)
            return
        assert text is not None, "there is a file or a prompt"
        messages = text if raw else turns(system, text)
        events = session.events(messages, on_prefill=show_prefill, **generation)
        if as_json:
            print_json({"text": "".join(event.text for event in events), "statistics": session.last})
            return
        stream(events, [])
        print_speed(session.last)


@with_generation(max_tokens=512, temperature=0.7, top_p=0.95)
def chat(
    bundle: BundlePath,
    *,
    adapter: Adapter = None,
    scale: Scale = 1.0,
    generation: dict[str, Any],
    system: System = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep the lines that you type for the next chat.")
    ] = False,
    threads: Threads = None,
    kv: KvPrecision = "float16",
    max_context: MaxContext = None,
    no_check: NoCheck = False,
) -> None:
    """Talk with the model. /help lists what you can do beside asking."""
    from bedplate.cli.commands import talk_until_end
    from bedplate.cli.lines import terminal_or_stdin
    from bedplate.cli.talk import Talk
    from bedplate.runtime.engine import Engine

    check_texts({"--system": system})
    opened = Bundle.open(bundle, check=not no_check)
    with Engine(opened, threads=threads, kv=kv, max_context=max_context) as engine:
        session = engine.session(adapter)
        if scale != 1:
            session.use(adapter, scale=scale)
        talk = Talk(engine, session, generation, system)
        talk_until_end(talk, terminal_or_stdin(keep_history=not no_history))
