"""The command line. Each command reads its options and calls the Python API."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from bedplate.cli.output import prepare_output, reported_errors

# Where each command stands. A module is imported, and its options are read, when one of its commands is wanted.
COMMANDS = {
    "build": "making.build",
    "add": "making.add",
    "merge": "making.merge",
    "remove": "making.remove",
    "export": "making.export",
    "list": "showing.list_adapters",
    "inspect": "showing.inspect",
    "verify": "showing.verify",
    "eval": "showing.evaluate",
    "bench": "showing.bench",
    "run": "running.run",
    "chat": "running.chat",
    "serve": "serving.serve",
    "cache": "making.cache",
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # A name that is not known is compared with all that are.
        for name in (cmd_name,) if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _read(name)
        return self.commands.get(cmd_name)


def _read(name: str) -> Any:
    module, _, function = COMMANDS[name].partition(".")
    found = getattr(import_module(f"bedplate.cli.{module}"), function)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name)(found)
        found = alone
    command: Any = typer.main.get_command(found)
    command.name = name
    return command


app = _Commands(
    name="bedplate",
    help="One quantized foundation, many LoRA adapters, stock ExecuTorch files.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text, whatever reads it
)


def main() -> None:
    """Entry point of the `bedplate` command."""
    prepare_output()
    with reported_errors():
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is still reported
            if "torch" in sys.modules and "bedplate.runtime.engine" not in sys.modules:
                # The process ends, and to look for cycles among torch's objects takes a second. What an engine has
                # made must go through that: native memory that is held at the end is told as a leak.
                gc.freeze()
