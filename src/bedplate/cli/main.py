"""The command line. Each command reads its options and calls the Python API."""

from __future__ import annotations

import sys

import typer

from bedplate.cli import making, running, serving, showing
from bedplate.cli.output import prepare_output, reported_errors

app = typer.Typer(
    name="bedplate",
    help="One quantized foundation, many LoRA adapters, stock ExecuTorch files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, whatever reads it
)
cache = typer.Typer(
    help="Show or remove the compiled units on this machine.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(cache, name="cache")

app.command("build")(making.build)
app.command("add")(making.add)
app.command("merge")(making.merge)
app.command("remove")(making.remove)
app.command("export")(making.export)
app.command("list")(showing.list_adapters)
app.command("inspect")(showing.inspect)
app.command("verify")(showing.verify)
app.command("eval")(showing.evaluate)
app.command("bench")(showing.bench)
app.command("run")(running.run)
app.command("chat")(running.chat)
app.command("serve")(serving.serve)
cache.command("list")(making.cache_list)
cache.command("clear")(making.cache_clear)


def main() -> None:
    """Entry point of the `bedplate` command."""
    prepare_output()
    with reported_errors():
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is still reported
