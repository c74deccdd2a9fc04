"""Shared by all tests: a toy model with adapters, and the bundles built from it, once a run.

A run has one process, or several workers (`pytest -n 2`); what takes long to make they make once, in a folder of all.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import quiet_torch  # noqa: F401
import torch
from schedule import in_order, scheduler
from shared import Shared
from toy import BuildToy, save_adapter, save_toy_model, toy_config

import bedplate

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """What all workers of this run share. Nobody may have changed it in the end."""
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent if hasattr(request.config, "workerinput") else own
    shared = Shared(of_all / "shared")
    yield shared
    assert shared.changed() == [], "a test must copy what it wants to change"


@pytest.fixture(scope="session")
def unit_cache(shared: Shared) -> Path:
    """Compiled units of this run: each structure is lowered once."""
    return shared.units


@pytest.fixture(scope="session")
def toy_model(shared: Shared) -> Path:
    return shared.made("toy", lambda folder: save_toy_model(folder, toy_config()))


@pytest.fixture(scope="session")
def toy_adapters(shared: Shared, toy_model: Path) -> dict[str, Path]:
    """`all`: rank 4 on all seven linears. `qv`: rank 8 on two. `all2`: as `all`, of other values."""

    def make(folder: Path) -> None:
        save_adapter(folder / "all", toy_model, seed=1)
        save_adapter(folder / "all2", toy_model, seed=2)
        save_adapter(folder / "qv", toy_model, seed=3, rank=8, targets=["q_proj", "v_proj"])

    folder = shared.made("adapters", make)
    return {name: folder / name for name in ("all", "all2", "qv")}


@pytest.fixture(scope="session")
def build_toy(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, shared: Shared) -> BuildToy:
    """Build a bundle of the toy model; a fresh one, so that a test may change it."""

    def build(model: Path = toy_model, *, out: Path | None = None, **options: Any) -> bedplate.Bundle:
        out = out or tmp_path_factory.mktemp("bundle") / "toy.bundle"
        return bedplate.build(model, out, **{"max_context": 128, "unit_cache": shared.units, **options})

    return build


@pytest.fixture(scope="session")
def toy_bundle(build_toy: BuildToy, toy_adapters: dict[str, Path], shared: Shared) -> bedplate.Bundle:
    """8da4w, with the adapters `all` and `all2` in float32 and `all8` in 8 bits. Not to be changed."""

    def make(out: Path) -> None:
        bundle = build_toy(out=out)
        bundle.add(toy_adapters["all"], name="all", quantize="none", unit_cache=shared.units)
        bundle.add(toy_adapters["all2"], name="all2", quantize="none", unit_cache=shared.units)
        bundle.add(toy_adapters["all"], name="all8", quantize="8w", unit_cache=shared.units)

    return bedplate.Bundle.open(shared.made("toy.bundle", make))


@pytest.fixture(scope="session")
def float_bundle(build_toy: BuildToy, toy_adapters: dict[str, Path], shared: Shared) -> bedplate.Bundle:
    """Unquantized, with the adapters `all` and `qv`. Not to be changed."""

    def make(out: Path) -> None:
        bundle = build_toy(out=out, quantize="none")
        for name in ("all", "qv"):
            bundle.add(toy_adapters[name], name=name, unit_cache=shared.units)

    return bedplate.Bundle.open(shared.made("float.bundle", make))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toys are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure() -> None:
    # Where tests run in the background, a shell has Ctrl-C ignored, also for the processes that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = in_order(items)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)
