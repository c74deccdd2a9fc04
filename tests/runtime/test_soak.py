"""Sixteen adapters, eight threads, thousands of random operations: each answer is the one that it is alone."""

from __future__ import annotations

import gc
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soak
from safetensors.numpy import load_file, save_file
from soak import WEIGHTS, Answer, Told, World
from toy import BuildToy, save_adapter

from bedplate import Bundle, Engine

ADAPTERS = 16
VERSIONS = 3  # of each adapter
BLOCK = 49_152


@pytest.fixture(scope="module")
def versions(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as PEFT saves them, by the name of the adapter and a number."""
    folder = tmp_path_factory.mktemp("versions")
    first = save_adapter(folder / "first", toy_model, seed=100)
    drawn, made = np.random.default_rng(0), {}
    for name in (f"a{number:02}-{version}" for number in range(ADAPTERS) for version in range(VERSIONS)):
        made[name] = shutil.copytree(first, folder / name)
        tensors = load_file(made[name] / "adapter_model.safetensors")
        for key in (key for key in tensors if "lora_B" in key):
            tensors[key] = drawn.normal(0, 0.1, tensors[key].shape).astype(np.float32)
        save_file(tensors, made[name] / "adapter_model.safetensors", {"format": "pt"})
    return made


def add(bundle: Bundle, folders: dict[str, Path], *, eight: bool) -> None:
    quantize = "8w" if eight else "none"
    bundle.add_all(folders, quantize=quantize, programs=False, allow_noop=True)


def is_eight(version: str) -> bool:
    return int(version[1:3]) % 2 == 1


@pytest.fixture(scope="module")
def all_versions(build_toy: BuildToy, versions: dict[str, Path]) -> Bundle:
    """A bundle with each version as an adapter of its own."""
    made = build_toy(programs=False)
    for eight in (False, True):
        add(made, {name: path for name, path in versions.items() if is_eight(name) == eight}, eight=eight)
    return made


@pytest.fixture
def bundle(build_toy: BuildToy, versions: dict[str, Path]) -> Bundle:
    """The first version of each."""
    made = build_toy(programs=False)
    first = {name.split("-")[0]: path for name, path in versions.items() if name.endswith("-0")}
    for eight in (False, True):
        add(made, {name: path for name, path in first.items() if is_eight(name) == eight}, eight=eight)
    return made


def replacing(bundle: Bundle, versions: dict[str, Path]) -> Callable[[str], str]:
    """Puts any version in the place of an adapter."""
    drawn = random.Random(1)

    def replace(name: str) -> str:
        version = f"{name}-{drawn.randrange(VERSIONS)}"
        bundle.remove(name)
        add(bundle, {name: versions[version]}, eight=is_eight(name))
        return version

    return replace


def resident(engine: Engine) -> int:
    gc.collect()
    return engine.memory().process


def differing(told: list[Told], bundle: Bundle, folder: Path) -> list[tuple[Told, Answer]]:
    """Those that are not as in a fresh process, and what they are there."""
    requests = list(dict.fromkeys(one.request for one in told))
    asked, found = folder / "requests.json", folder / "answers.json"
    asked.write_text(json.dumps(requests))
    subprocess.run([sys.executable, soak.__file__, bundle.path, asked, found], check=True)
    expected = dict(zip(requests, map(Answer.of, json.loads(found.read_text())), strict=True))
    return [(one, expected[one.request]) for one in told if not one.agrees(expected[one.request])]


@pytest.mark.parametrize(
    ("operations", "rounds"),
    [(600, 1), pytest.param(10_000, 10, marks=pytest.mark.slow)],
)
def test_each_answer_is_the_same_as_alone(
    operations: int,
    rounds: int,
    bundle: Bundle,
    all_versions: Bundle,
    versions: dict[str, Path],
    tmp_path: Path,
) -> None:
    with Engine(bundle, threads=2, cache_bytes=24 * BLOCK, memory_bytes=130 * BLOCK) as engine:
        first = {name: f"{name}-0" for name in bundle.adapters}
        world, sizes = World(engine, first, replacing(bundle, versions), tmp_path), []
        for number in range(rounds):
            world.run(8, operations // rounds, seed=number)
            world.forget()
            sizes.append(resident(engine))
            memory = engine.memory()
            assert (memory.kv, memory.cache, memory.foundation, memory.adapters) == (0, 0, 0, {})
    assert not differing(world.told, all_versions, tmp_path)
    whole = [one for one in world.told if one.answer.is_whole]
    assert len(whole) > operations / 5
    assert len({one.request.version for one in whole}) > ADAPTERS
    assert set(world.counts) >= set(WEIGHTS)
    # What was kept of answers is a kilobyte each. The allocator's slack comes and goes; what leaks adds up.
    if rounds > 3:
        assert max(sizes[-3:]) - max(sizes[1:4]) < 8_000_000, sizes
