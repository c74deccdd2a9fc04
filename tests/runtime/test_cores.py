"""How many threads an engine has, if nobody says so: the cores that the process may use, and has the time of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bedplate.runtime.cores import physical_cores, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bedplate.runtime.cores.physical_cores", lambda: 8)


class Groups:
    """Files as the system shows them."""

    def __init__(self, folder: Path) -> None:
        self.root, self.own = folder / "cgroup", folder / "own"

    def write(self, own: str, files: dict[str, str]) -> Groups:
        self.own.write_text(own)
        for name, content in files.items():
            file = self.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")
        return self

    def cores(self) -> int:
        return usable_cores(cgroups=self.root, own=self.own)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


@pytest.mark.parametrize(
    ("said", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("6400 3200", 2),
        ("max 100000", 8),
        ("6400000 100000", 8),
        ("", 8),
        ("200000", 8),
        ("0 0", 8),
        ("some 100000", 8),
    ],
)
def test_a_quota_of_cgroup_v2(groups: Groups, said: str, cores: int) -> None:
    assert groups.write("0::/\n", {"cpu.max": said}).cores() == cores
    assert groups.write("0::/\n", {"cpu.max": "max 100000", "unified/cpu.max": said}).cores() == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [
        ("200000", "100000", 2),
        ("250000", "100000", 3),
        ("-1", "100000", 8),
        ("10000", "100000", 1),
        ("", "", 8),
    ],
)
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_cgroup_v1(groups: Groups, quota: str, period: str, cores: int, folder: str) -> None:
    own = f"12:pids:/\n5:{folder}:/\n3:cpuset:/\n"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}
    assert groups.write(own, files).cores() == cores


def test_the_least_of_all_groups_around_the_process_counts(groups: Groups) -> None:
    files = {
        "cpu.max": "max 100000",
        "outer/cpu.max": "300000 100000",
        "outer/inner/cpu.max": "500000 100000",
        "outer/inner/own/cpu.max": "max 100000",
        "other/cpu.max": "100000 100000",
    }
    assert groups.write("0::/outer/inner/own\n", files).cores() == 3
    assert groups.write("0::/other\n", files).cores() == 1
    assert groups.write("0::/\n", files).cores() == 8


def test_a_path_of_the_machine_in_a_container(groups: Groups) -> None:
    """Its folders are not there: what stands at the root are the container's own files."""
    v1 = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    assert groups.write("4:cpu,cpuacct:/docker/5e1f\n", v1).cores() == 2
    assert groups.write("0::/../../elsewhere\n", {"cpu.max": "300000 100000"}).cores() == 3


def test_without_any_of_these_files(groups: Groups) -> None:
    assert groups.cores() == 8
    assert groups.write("no line of a group\n", {}).cores() == 8


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= usable_cores() <= physical_cores() <= len(os.sched_getaffinity(0))


ALLOWED = """
import os
from bedplate.runtime.cores import usable_cores
print(len(os.sched_getaffinity(0)), usable_cores())
"""


def test_the_cores_that_the_process_may_use() -> None:
    one = str(min(os.sched_getaffinity(0)))
    words = ["taskset", "-c", one, sys.executable, "-c", ALLOWED]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "1 1\n"
