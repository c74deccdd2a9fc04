"""The README's walkthrough, run as it is written; what it prints is what the README shows, numbers aside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def walkthrough() -> list[tuple[str, str]]:
    """(language, text) of each block in the section."""
    text = (REPOSITORY / "README.md").read_text("utf-8")
    section = text.split("\n## Walkthrough\n")[1].split("\n## ")[0]
    return _BLOCK.findall(section)


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, what it prints) of a console block: `$ ` begins a command, `> ` goes on with it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1
        while count < len(lines) and lines[count].startswith("> "):
            count += 1
        command = [lines[0], *(line.removeprefix("> ") for line in lines[1:count])]
        yield "\n".join(command), "\n".join(lines[count:])


def without_numbers(text: str) -> list[str]:
    """Lines with every number as N, keys as KEY and runs of blanks as one.

    Without the stages that a build goes through: which there are depends on what the unit cache holds.
    """
    text = re.sub(r"\b[0-9a-f]{12}\b", "KEY", text)
    text = re.sub(r"\d[\d.,]*", "N", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if not line.endswith(" …")]


def answers(text: str) -> list[str]:
    """The lines whose numbers count: JSON."""
    return [line for line in text.splitlines() if line.startswith(("{", "  "))]


@pytest.fixture
def folder(tmp_path: Path, unit_cache: Path) -> Path:
    """A folder that looks like the repository after `make demo`, with a unit cache of this session."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    (tmp_path / ".cache/bedplate").mkdir(parents=True)
    (tmp_path / ".cache/bedplate/units").symlink_to(unit_cache)
    return tmp_path


@pytest.mark.real_model
def test_walkthrough(folder: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache")}
    setup = ""
    for language, block in walkthrough():
        if language == "python":
            run = subprocess.run(
                [sys.executable, "-c", block], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert run.returncode == 0, run.stderr
            assert re.search(r"^sentiment → positive \(\d+ tokens\)$", run.stdout, re.MULTILINE)
            continue
        for command, shown in commands(block):
            if command.startswith("source "):
                setup = command
                continue
            script = f"set -eo pipefail; {setup}; {command}"
            run = subprocess.run(
                ["bash", "-c", script],
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert run.returncode == 0, f"{command}\n{run.stdout}"
            assert answers(run.stdout) == answers(shown), command
            assert without_numbers(run.stdout) == without_numbers(shown), command


def test_walkthrough_is_there() -> None:
    blocks = walkthrough()
    assert [language for language, _ in blocks].count("python") == 1
    names = {
        command.split()[1]
        for language, block in blocks
        if language == "console"
        for command, _ in commands(block)
    }
    assert names >= {"build", "add", "remove", "run", "verify", "inspect"}


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
