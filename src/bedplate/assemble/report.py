"""How a long command reports what it does, and the imports that take long themselves."""

from __future__ import annotations

import sys
from typing import Protocol

from bedplate.errors import UnsupportedError


class Reporter(Protocol):
    """Gets reports from a command while it works, one after the other. Some come from a thread of its own."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        """`done` of `total` steps of a stage are done. total: None if it is not known."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""


class Silent:
    """Drops all reports."""

    def progress(self, stage: str, done: int, total: int | None) -> None:
        pass

    def notice(self, text: str) -> None:
        pass


SILENT: Reporter = Silent()


def load_torch(reporter: Reporter) -> None:
    """Import torch, which quantizes. UnsupportedError: it is not installed."""
    _load(("torch",), "import torch", reporter)


def load_torchao(reporter: Reporter) -> None:
    """Import torchao, which finds the scales of `hqq`. UnsupportedError: it is not installed."""
    _load(("torch", "torchao"), "import torchao", reporter)


def load_exporter(reporter: Reporter) -> None:
    """Import torch and ExecuTorch's exporter, which compile. UnsupportedError: they are not installed."""
    _load(("torch", "torchao", "executorch.exir"), "import the exporter", reporter)


def _load(modules: tuple[str, ...], stage: str, reporter: Reporter) -> None:
    if all(sys.modules.get(module) for module in modules):
        return
    from bedplate.quiet import import_modules  # logging, which a program that only runs does without

    reporter.progress(stage, 0, None)
    try:
        import_modules(modules)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this needs the Python package {error.name}", hint="pip install 'bedplate[build]'"
        ) from error
    reporter.progress(stage, 1, 1)
