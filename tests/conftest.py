"""Shared by all tests: a toy model with adapters, and the bundles built from it, once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import BuildToy, save_adapter, save_toy_model, toy_config

import bedplate


@pytest.fixture(scope="session")
def unit_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled units of this session: each structure is lowered once."""
    return tmp_path_factory.mktemp("units")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "model"
    save_toy_model(folder, toy_config())
    return folder


@pytest.fixture(scope="session")
def toy_adapters(tmp_path_factory: pytest.TempPathFactory, toy_model: Path) -> dict[str, Path]:
    """`all`: rank 4 on all seven linears. `qv`: rank 8 on two. `all2`: as `all`, of other values."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "all": save_adapter(folder / "all", toy_model, seed=1),
        "all2": save_adapter(folder / "all2", toy_model, seed=2),
        "qv": save_adapter(folder / "qv", toy_model, seed=3, rank=8, targets=["q_proj", "v_proj"]),
    }


@pytest.fixture(scope="session")
def build_toy(tmp_path_factory: pytest.TempPathFactory, toy_model: Path, unit_cache: Path) -> BuildToy:
    """Build a bundle of the toy model; a fresh one, so that a test may change it."""

    def build(model: Path = toy_model, **options: Any) -> bedplate.Bundle:
        out = tmp_path_factory.mktemp("bundle") / "toy.bundle"
        return bedplate.build(model, out, **{"max_context": 128, "unit_cache": unit_cache, **options})

    return build


@pytest.fixture(scope="session")
def toy_bundle(build_toy: BuildToy, toy_adapters: dict[str, Path], unit_cache: Path) -> bedplate.Bundle:
    """8da4w, with the adapters `all` and `all2` in float32 and `all8` in 8 bits. Not to be changed."""
    bundle = build_toy()
    bundle.add(toy_adapters["all"], name="all", quantize="none", unit_cache=unit_cache)
    bundle.add(toy_adapters["all2"], name="all2", quantize="none", unit_cache=unit_cache)
    bundle.add(toy_adapters["all"], name="all8", quantize="8w", unit_cache=unit_cache)
    return bundle


@pytest.fixture(scope="session")
def float_bundle(build_toy: BuildToy, toy_adapters: dict[str, Path], unit_cache: Path) -> bedplate.Bundle:
    """Unquantized, with the adapters `all` and `qv`. Not to be changed."""
    bundle = build_toy(quantize="none")
    for name in ("all", "qv"):
        bundle.add(toy_adapters[name], name=name, unit_cache=unit_cache)
    return bundle
