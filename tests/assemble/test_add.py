"""Adding adapters: several at once, at ranks that have no units of their own, in models whose layers differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eager import eager_decoder, eager_logits
from recorder import Recorder
from toy import BuildToy, save_adapter

from bedplate import Bundle, Engine
from bedplate.bundle.usage import sharing
from bedplate.errors import AdapterError, NameTakenError, NotFoundError

TOKENS = [5, 17, 101, 3, 250, 77, 8, 8, 19, 300, 2, 45]


def logits(bundle: Bundle, name: str | None) -> np.ndarray:
    with Engine(bundle, threads=1) as engine:
        return engine.session(name).logits(TOKENS)


@pytest.fixture
def bundle(build_toy: BuildToy, toy_bundle: Bundle) -> Bundle:
    """A new one without adapters. What it needs was compiled for the bundle that all tests share."""
    return build_toy()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "8w"])
def test_a_rank_without_units_is_filled_up_to_one_that_has_some(
    quantize: str, bundle: Bundle, toy_bundle: Bundle, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "three", toy_model, seed=8, rank=3)
    assert "all8" in toy_bundle.adapters, "whose units of rank 4 are there"
    recorder = Recorder()
    filled = bundle.add(adapter, name="filled", quantize=quantize, unit_cache=unit_cache, reporter=recorder)
    assert (filled.info.rank, filled.info.unit_rank, recorder.stages) == (3, 4, [])
    exact = bundle.add(adapter, name="exact", quantize=quantize, exact_rank=True, unit_cache=unit_cache)
    assert (exact.info.rank, exact.info.unit_rank) == (3, 3)
    np.testing.assert_array_equal(logits(bundle, "filled"), logits(bundle, "exact"))
    assert not np.array_equal(logits(bundle, "filled"), logits(bundle, None))


@pytest.mark.slow
def test_a_small_rank_is_not_filled_up_beyond_reason(bundle: Bundle, toy_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "units"
    for name, rank in (("large", 17), ("small", 2)):
        adapter = save_adapter(tmp_path / name, toy_model, seed=8, rank=rank, targets=["q_proj"])
        assert bundle.add(adapter, name=name, unit_cache=cache).info.unit_rank == rank
    nine = save_adapter(tmp_path / "nine", toy_model, seed=8, rank=9, targets=["q_proj"])
    assert bundle.add(nine, name="nine", unit_cache=cache).info.unit_rank == 17


@pytest.mark.usefixtures("float_bundle")  # has compiled what this needs
def test_matrices_have_8_bits_unless_the_foundation_is_float32(
    bundle: Bundle, build_toy: BuildToy, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    of_float = build_toy(quantize="none")
    found = {}
    for name, one in (("quantized", bundle), ("float", of_float)):
        entry = one.add(toy_adapters["all"], name="all", unit_cache=unit_cache)
        stored = {c.dtype for c in entry.info.constants if c.name.partition("#")[0].endswith("lora_a.weight")}
        found[name] = (entry.info.dtype, "int8" in stored)
    assert found == {"quantized": ("8w", True), "float": ("float32", False)}


def test_several_at_once(bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path) -> None:
    entries = bundle.add_all({"a": toy_adapters["all"], "b": toy_adapters["all2"]}, unit_cache=unit_cache)
    assert [entry.name for entry in entries] == ["a", "b"] == sorted(Bundle.open(bundle.path).adapters)
    assert not np.array_equal(logits(bundle, "a"), logits(bundle, "b"))


def test_several_are_what_they_are_alone(
    bundle: Bundle, toy_bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    names = ("all", "all2")
    bundle.add_all({name: toy_adapters[name] for name in names}, quantize="none", unit_cache=unit_cache)
    for name in names:
        there, here = toy_bundle.adapters[name], bundle.adapters[name]
        assert here.weights.read_bytes() == there.weights.read_bytes()
        assert here.program.read_bytes() == there.program.read_bytes()


def test_one_that_does_not_fit_keeps_all_out(
    bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    before = sorted(bundle.path.rglob("*"))
    with pytest.raises(NotFoundError, match="no such folder"):
        bundle.add_all({"a": toy_adapters["all"], "b": tmp_path / "none"}, unit_cache=unit_cache)
    with pytest.raises(AdapterError, match="cannot name"):
        bundle.add_all({"a": toy_adapters["all"], "b/c": toy_adapters["all"]}, unit_cache=unit_cache)
    assert sorted(bundle.path.rglob("*")) == before
    bundle.add(toy_adapters["all"], name="a", unit_cache=unit_cache)
    with pytest.raises(NameTakenError):
        bundle.add_all({"b": toy_adapters["all2"], "a": toy_adapters["all"]}, unit_cache=unit_cache)
    assert list(Bundle.open(bundle.path).adapters) == ["a"]


@pytest.mark.slow
def test_a_model_whose_layers_differ_is_lowered_as_a_whole(
    build_toy: BuildToy, toy_model: Path, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    recorder = Recorder()
    mixed = build_toy(overrides={"layers.1.*": "none"}, reporter=recorder)
    (notice,) = recorder.notices
    assert "layers.1." in notice and "float32" in notice and "one by one" in notice
    dtypes = {constant.name: constant.dtype for constant in mixed.foundation_info.constants}
    assert dtypes["layers.0.mlp.up_proj.weight#codes"] == "int4"
    assert dtypes["layers.1.mlp.up_proj.weight"] == "float32"

    again = Recorder()
    build_toy(overrides={"layers.1.*": "none"}, reporter=again)
    assert again.notices == [], "the program of this very structure is kept"

    mixed.add(toy_adapters["all"], name="all", quantize="none", unit_cache=unit_cache)
    sharing(mixed)
    for name in (None, "all"):
        adapter = None if name is None else toy_adapters[name]
        expected = eager_logits(eager_decoder(toy_model, mixed, adapter), TOKENS).numpy()
        # As in test_numerics: a code of an activation may fall on the other side of a border.
        assert np.median(np.abs(logits(mixed, name) - expected)) < 0.02 * expected.std()
