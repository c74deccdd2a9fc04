"""SIGKILL, whenever: a bundle is then as it was before or as it would be after, and the next command succeeds."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bedplate
from bedplate.bundle.usage import sharing

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, int]]
KILLS = 20  # of each command; which of its touches of the disk they hit is drawn from a seed


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run a command line in a fork of a process of its own, killed at its n-th touch of `folder`."""
    driver = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kill_driver.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert driver.stdin is not None and driver.stdout is not None
    commands, answers = driver.stdin, driver.stdout

    def command(argv: list[object], folder: Path, kill_at: int | None = None) -> dict[str, int]:
        order = {"argv": [str(word) for word in argv], "folder": str(folder), "kill_at": kill_at}
        commands.write(json.dumps(order) + "\n")
        commands.flush()
        return json.loads(answers.readline())  # type: ignore[no-any-return]

    with driver:
        yield command
        commands.close()


def state(bundle: Path) -> Any:
    """What the bundle holds, if there is one, after proof that it is whole."""
    if not bundle.exists():
        return None
    opened = bedplate.Bundle.open(bundle)
    sharing(opened)
    return opened.manifest


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("command", ["build", "build --force", "add", "add several", "remove"])
def test_killed_at_random_touches_of_the_disk(
    command: str,
    run: Run,
    toy_bundle: bedplate.Bundle,
    toy_model: Path,
    toy_adapters: dict[str, Path],
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    out = work / "toy.bundle"
    one, other = toy_adapters["all"], toy_adapters["all2"]
    build = ["build", toy_model, "-o", out, "--max-context", 128, "--unit-cache", unit_cache]
    argv: list[object] = {
        "build": build,
        "build --force": [*build, "--quantize", "none", "--force"],
        "add": ["add", out, one, "--name", "new", "--unit-cache", unit_cache],
        "add several": ["add", out, one, other, "--name", "x", "--name", "y", "--unit-cache", unit_cache],
        "remove": ["remove", out, "all"],
    }[command]

    def reset() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if command != "build":
            shutil.copytree(toy_bundle.path, out)

    reset()
    before = state(out)
    whole = run(argv, work)
    assert whole["code"] == 0
    after = state(out)
    assert before != after
    points = range(1, whole["touches"] + 1)
    seen = []
    for point in random.Random(0).sample(points, min(KILLS, len(points))):
        reset()
        assert run(argv, work, kill_at=point)["code"] == -signal.SIGKILL
        seen.append(state(out))
        assert seen[-1] in (before, after), f"killed at touch {point} of {len(points)}"
        if seen[-1] == before:
            following = [argv]
        elif command.startswith("build"):
            following = [[*argv, "--force"]]
        else:
            following = [["add", out, one, "--name", "z", "--unit-cache", unit_cache], ["remove", out, "z"]]
        assert [run(words, work)["code"] for words in following] == [0] * len(following)
        assert state(out) == after
        assert hidden(work) == []
    assert before in seen


def test_killed_at_random_times_while_compiling(
    toy_model: Path, toy_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """With an empty unit cache and nothing imported, as a user's first command is."""
    bedplate_command = str(Path(sys.executable).with_name("bedplate"))
    out, cache = tmp_path / "toy.bundle", tmp_path / "units"
    # In float32, which is lowered sooner.
    build = ["build", toy_model, "-o", out, "--max-context", 128, "--quantize", "none", "--unit-cache", cache]
    add = ["add", out, toy_adapters["qv"], "--unit-cache", cache]

    def start(argv: list[object]) -> subprocess.Popen[bytes]:
        words = [bedplate_command, *map(str, argv)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    drawn = random.Random(1)
    for argv in (build, add):
        before = state(out)
        for longest in (4.0, 10.0):
            process = start(argv)
            time.sleep(drawn.uniform(longest / 2, longest))
            process.kill()
            process.wait()
            if state(out) != before:
                break  # it had published first, whole as `state` has proven
        if state(out) == before:
            assert start(argv).wait() == 0
        assert state(out) != before
    with bedplate.Engine(bedplate.Bundle.open(out)) as engine:
        engine.session("qv").generate("the fox", max_tokens=2)
