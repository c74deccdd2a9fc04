"""Adding adapters: several at once, at ranks that have no units of their own, in models whose layers differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_formats import as_bin, as_gguf, as_mlx, as_torchtune
from eager import check_quantized, eager_decoder
from recorder import Recorder
from safetensors.torch import load_file, save_file
from toy import BuildToy, reference, save_adapter, toy_config

from bedplate import Bundle, Engine
from bedplate.bundle.usage import sharing
from bedplate.errors import AdapterError, NameTakenError, NotFoundError

TOKENS = [5, 17, 101, 3, 250, 77, 8, 8, 19, 300, 2, 45]


def logits(bundle: Bundle, name: str | None) -> np.ndarray:
    with Engine(bundle, threads=1, kv="float32") as engine:
        return engine.session(name).logits(TOKENS)


@pytest.fixture
def bundle(build_toy: BuildToy, toy_bundle: Bundle) -> Bundle:
    """A new one without adapters. What it needs was compiled for the bundle that all tests share."""
    return build_toy()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["8w"])
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
def test_a_small_rank_is_not_filled_up_beyond_reason(
    build_toy: BuildToy, toy_model: Path, tmp_path: Path
) -> None:
    bundle = build_toy(quantize="none")  # its units are lowered sooner
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
    with pytest.raises(NotFoundError, match="no such file or folder"):
        bundle.add_all({"a": toy_adapters["all"], "b": tmp_path / "none"}, unit_cache=unit_cache)
    with pytest.raises(AdapterError, match="cannot be the name"):
        bundle.add_all({"a": toy_adapters["all"], "b/c": toy_adapters["all"]}, unit_cache=unit_cache)
    assert sorted(bundle.path.rglob("*")) == before
    bundle.add(toy_adapters["all"], name="a", unit_cache=unit_cache)
    with pytest.raises(NameTakenError):
        bundle.add_all({"b": toy_adapters["all2"], "a": toy_adapters["all"]}, unit_cache=unit_cache)
    assert list(Bundle.open(bundle.path).adapters) == ["a"]


@pytest.mark.parametrize("exact_rank", [False, True])
def test_ranks_and_layers_of_their_own_run_as_in_peft(
    exact_rank: bool,
    build_toy: BuildToy,
    float_bundle: Bundle,
    toy_model: Path,
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    """Zeros stand for the layer that is not adapted, and fill up the lower ranks."""
    adapter = save_adapter(
        tmp_path / "mixed",
        toy_model,
        seed=4,
        rank=8,
        targets=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 3, "layers.2.self_attn.q_proj": 5},
        alpha_pattern={"layers.0.self_attn.v_proj": 2.5},
        layers_to_transform=[0, 2],
    )
    assert "qv" in float_bundle.adapters, "whose units of rank 8 are there"
    bundle = build_toy(quantize="none")
    entry = bundle.add(adapter, name="mixed", exact_rank=exact_rank, unit_cache=unit_cache)
    assert (entry.info.rank, entry.info.unit_rank) == (8, 8)
    with torch.no_grad():
        expected = reference(toy_model, adapter)(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(logits(bundle, "mixed"), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(logits(bundle, None) - expected).max() > 0.1


def test_an_adapter_of_some_layers_in_8_bits(
    bundle: Bundle, toy_bundle: Bundle, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    assert "all8" in toy_bundle.adapters, "whose units are there"
    adapter = save_adapter(tmp_path / "some", toy_model, seed=4, layers_to_transform=[1])
    bundle.add(adapter, name="some", unit_cache=unit_cache)
    check_quantized(logits(bundle, "some"), eager_decoder(toy_model, bundle, adapter, "8w"), TOKENS)
    assert not np.array_equal(logits(bundle, "some"), logits(bundle, None))


def test_what_a_user_must_know_of_an_adapter_is_told(
    bundle: Bundle, toy_bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(toy_adapters["all"], tmp_path / "pissa_backup")
    recorder = Recorder()
    bundle.add(folder, name="new", unit_cache=unit_cache, reporter=recorder)
    assert any("training began with PiSSA" in notice for notice in recorder.notices)


@pytest.fixture(scope="module")
def idle(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as it is before training: B is all zeros."""
    folder = save_adapter(tmp_path_factory.mktemp("idle") / "idle", toy_model, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    zeros = {name: value * ("lora_B" not in name) for name, value in tensors.items()}
    save_file(zeros, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("quantize", ["none", "8w"])
def test_an_adapter_that_changes_nothing_is_refused(
    quantize: str, bundle: Bundle, idle: Path, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*") if path.is_file()}
    with pytest.raises(AdapterError, match=r"changes nothing.*\(b\)") as caught:
        bundle.add_all({"a": toy_adapters["all"], "b": idle}, quantize=quantize, unit_cache=unit_cache)
    assert caught.value.where == str(idle) and "--allow-noop" in str(caught.value.hint)
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*") if path.is_file()} == before
    assert bundle.adapters == {}
    bundle.add(idle, name="b", quantize=quantize, allow_noop=True, unit_cache=unit_cache)
    np.testing.assert_array_equal(logits(bundle, "b"), logits(bundle, None))


def test_an_adapter_that_changes_next_to_nothing_is_taken(
    bundle: Bundle, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "weak", toy_model, seed=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    last = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    weak = {name: value * (1e-3 if name == last else "lora_B" not in name) for name, value in tensors.items()}
    save_file(weak, folder / "adapter_model.safetensors")
    bundle.add(folder, name="weak", unit_cache=unit_cache)
    assert 0 < np.abs(logits(bundle, "weak") - logits(bundle, None)).max() < 0.1


def test_adding_leaves_engines_as_they_are(
    bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    with Engine(bundle, threads=1) as engine:
        session = engine.session()
        expected = session.logits(TOKENS)
        bundle.add(toy_adapters["all"], name="a", unit_cache=unit_cache)
        assert session.tokens == tuple(TOKENS) and engine.load().decoder.threads == 1
        np.testing.assert_array_equal(session.logits(TOKENS), expected)
        assert not np.array_equal(engine.session("a").logits(TOKENS), expected)


def test_one_adapter_in_the_form_of_each_tool_is_one_adapter(
    bundle: Bundle, toy_bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    peft, config = toy_adapters["all"], toy_config()
    forms = {
        "bin": as_bin(peft, tmp_path / "bin"),
        "torchtune": as_torchtune(peft, tmp_path / "torchtune", config),
        "mlx": as_mlx(peft, tmp_path / "mlx"),
        "gguf": as_gguf(peft, tmp_path / "a.gguf", config),
    }
    bundle.add_all(forms, quantize="none", unit_cache=unit_cache)
    for name in forms:
        assert bundle.adapters[name].weights.read_bytes() == toy_bundle.adapters["all"].weights.read_bytes()
        assert bundle.adapters[name].info.alpha == 8.0


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
        check_quantized(logits(mixed, name), eager_decoder(toy_model, mixed, adapter), TOKENS)
