"""Adapters with constants of their own in place of the base's, and what is computed from the base's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import save_trained, with_peft
from peft import LoraConfig
from recorder import Recorder
from toy import ALL_LINEARS, BuildToy

from bedplate import Bundle, Engine
from bedplate.assemble import adapter_constants
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.usage import sharing
from bedplate.bundle.values import Values
from bedplate.model.checkpoint import open_checkpoint
from bedplate.oracle import stock_program

pytestmark = pytest.mark.slow

TOKENS = [5, 17, 101, 3, 250, 77, 8, 8, 19, 300, 2, 45]


def lora(**fields: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS, task_type="CAUSAL_LM", **fields)


def logits(bundle: Bundle, name: str | None) -> np.ndarray:
    with Engine(bundle, kv="float32") as engine:
        return engine.session(name).logits(TOKENS)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


@pytest.mark.parametrize("names", [["norm"], ["lm_head"], ["lm_head", "embed_tokens", "norm"]], ids="-".join)
def test_norms_and_tables_of_its_own_take_the_place_of_the_bases_in_the_program(
    names: list[str],
    float_bundle: Bundle,
    build_toy: BuildToy,
    toy_model: Path,
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    assert "all" in float_bundle.adapters, "whose units are there"
    adapter = save_trained(tmp_path / "adapter", toy_model, lora(modules_to_save=names))
    bundle, recorder = build_toy(quantize="none"), Recorder()
    entry = bundle.add(adapter, name="a", unit_cache=unit_cache, reporter=recorder)
    assert entry.program is not None and recorder.stages == []
    own = {info.name for info in entry.info.constants}
    wanted = {"norm": "norm.weight", "lm_head": "lm_head.weight", "embed_tokens": "embed_tokens.weight"}
    assert {wanted[name] for name in names} <= own
    sharing(bundle)
    expected = with_peft(toy_model, adapter, TOKENS).numpy()
    for found in (logits(bundle, "a"), stock_program(bundle, "a").logits(TOKENS)):
        # Sums of the same terms in another order; the largest logits are about 6.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "copies", "layers"),
    [
        ({"quantize": "none"}, [(0, 2), (1, 3), (0, 1)], (0, 1, 1, 2, 0)),
        ({}, [(0, 2), (1, 3), (0, 1)], (0, 1, 1, 2, 0)),
        # Lowered as a whole. The base is that of test_add.py, which is lowered once for both.
        ({"overrides": {"layers.1.*": "none"}}, [(0, 2), (1, 2)], (0, 1, 1)),
    ],
    ids=["float", "4 bits", "both"],
)
def test_replicated_layers_have_a_program(
    options: dict[str, object],
    copies: list[tuple[int, int]],
    layers: tuple[int, ...],
    build_toy: BuildToy,
    toy_model: Path,
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    """Which names the base's constants in several layers."""
    config = lora(layer_replication=copies, modules_to_save=["norm"])
    adapter = save_trained(tmp_path / "adapter", toy_model, config)
    bundle = build_toy(**options)
    entry = bundle.add(adapter, name="a", unit_cache=unit_cache)
    assert entry.info.layers == layers
    assert {use.name: use.from_foundation for use in sharing(bundle).programs}["a"] > 0
    ours, stock = logits(bundle, "a"), stock_program(bundle, "a").logits(TOKENS)
    expected = with_peft(toy_model, adapter, TOKENS).numpy()
    if options.get("quantize") == "none":
        for found in (ours, stock):
            # Sums of the same terms in another order; the largest logits are about 6.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    else:
        effect = rms(expected - with_peft_base(toy_model))
        # They round inputs differently, which costs less than the 4 bits of the weights do.
        assert rms(ours - stock) < 0.5 * rms(stock - expected) and rms(ours - expected) < 0.5 * effect


def test_a_table_of_its_own_is_quantized_as_the_bases_is(
    toy_bundle: Bundle, build_toy: BuildToy, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    assert "all8" in toy_bundle.adapters, "whose units are there"
    config = lora(modules_to_save=["lm_head", "embed_tokens", "norm"])
    adapter = save_trained(tmp_path / "adapter", toy_model, config)
    bundle = build_toy()
    bundle.add(adapter, name="a", unit_cache=unit_cache)
    expected = with_peft(toy_model, adapter, TOKENS).numpy()
    ours, stock = logits(bundle, "a"), stock_program(bundle, "a").logits(TOKENS)
    effect = rms(expected - with_peft_base(toy_model))
    # They round inputs differently, which costs less than the 4 bits of the weights do.
    assert rms(ours - stock) < 0.5 * rms(stock - expected) and rms(ours - expected) < 0.5 * effect
    kinds = {info.name: info.dtype for info in bundle.adapters["a"].info.constants}
    base = {info.name: info.dtype for info in bundle.foundation_info.constants}
    for name in ("lm_head.weight#codes", "embed_tokens.weight#codes", "embed_tokens.weight#scales"):
        assert kinds[name] == base[name]


def with_peft_base(model: Path) -> np.ndarray:
    from families import theirs

    return theirs(model, TOKENS).numpy()


@pytest.mark.parametrize("quantize", ["none", "8da4w"])
def test_a_copy_of_the_bases_tables_is_left_out(
    quantize: str, build_toy: BuildToy, toy_model: Path, tmp_path: Path
) -> None:
    """PEFT saves one beside every LoRA on the head or the embedding."""
    adapter = save_trained(
        tmp_path / "adapter", toy_model, LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"])
    )
    bundle = build_toy(quantize=quantize, programs=False)
    info = bundle.add(adapter, name="a").info
    names = {one.name.partition("#")[0] for one in (*info.constants, *info.shared)}
    halves = {
        f"{table}.{half}.weight" for table in ("lm_head", "embed_tokens") for half in ("lora_a", "lora_b")
    }
    assert names == halves


@pytest.mark.parametrize("embedding", ["4", "8"])
@pytest.mark.parametrize(
    "options", [{"method": "plain", "head": "8da4w"}, {"head": "8da4w"}, {"group_size": 0}], ids=str
)
def test_tables_become_the_bases_constants_bit_for_bit(
    options: dict[str, object], embedding: str, build_toy: BuildToy, toy_model: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"])
    adapter = save_as_it_starts(tmp_path / "adapter", toy_model, config)
    bundle = build_toy(programs=False, embedding=embedding, **options)
    info = bundle.add(adapter, name="a", allow_noop=True).info
    assert not [one.name for one in (*info.constants, *info.shared) if ".lora_" not in one.name]


def save_as_it_starts(folder: Path, model: Path, config: LoraConfig) -> Path:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [5]}, "an activated LoRA (aLoRA)"),
    ],
    ids=["dora", "activated"],
)
def test_what_a_program_does_not_compute_is_told(
    bundle_of_float: Bundle,
    toy_model: Path,
    unit_cache: Path,
    tmp_path: Path,
    fields: dict[str, object],
    what: str,
) -> None:
    adapter = save_trained(tmp_path / "adapter", toy_model, lora(**fields))
    recorder = Recorder()
    entry = bundle_of_float.add(adapter, name="a", unit_cache=unit_cache, reporter=recorder)
    assert entry.program is None and bundle_of_float.base_program is not None
    assert any("a has no program" in notice and what in notice for notice in recorder.notices)


@pytest.fixture
def bundle_of_float(float_bundle: Bundle, build_toy: BuildToy) -> Bundle:
    assert float_bundle.base_program is not None, "whose units are there"
    return build_toy(quantize="none")


def test_the_lengths_of_rows_are_those_before_they_were_quantized(
    toy_bundle: Bundle, toy_model: Path, build_toy: BuildToy, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(toy_model)
    constants = NamedConstants(toy_bundle.foundation, toy_bundle.foundation_info.constants)
    with constants:
        values = Values(constants, checkpoint.spec)
        for path in ("layers.1.self_attn.k_proj", "layers.2.mlp.down_proj", "lm_head"):
            name = "embed_tokens" if path == "lm_head" else path
            weight = checkpoint.tensor(f"{name}.weight").double()
            found = values.floats(f"{path}.row_norms", len(weight))
            np.testing.assert_allclose(found, weight.square().sum(1).numpy(), rtol=1e-6)
            # What a linear and its correction compute with is near to it, with what is joined taken apart.
            off = values.linear(path) - weight.numpy()
            assert rms(off) < 0.15 * rms(weight.numpy()), path


def test_factors_of_dora_come_from_the_float_weights(
    toy_model: Path, build_toy: BuildToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of few bits have other lengths. Those of float are kept: only their products with B A are of few bits."""
    adapter = save_trained(tmp_path / "adapter", toy_model, lora(use_dora=True))
    factors: dict[str, np.ndarray] = {}
    for kind, quantize in {"float": "none", "few bits": "8da4w", "of few bits alone": "8da4w"}.items():
        bundle = build_toy(quantize=quantize, programs=False)
        if kind == "of few bits alone":
            monkeypatch.setattr(adapter_constants, "ROW_NORMS", "not there")
        info = bundle.add(adapter, name="a").info
        with NamedConstants(bundle.adapters["a"].weights, info.constants) as constants:
            values = Values(constants, open_checkpoint(toy_model).spec, info.ranks)
            names = [one.name for one in info.constants if one.name.endswith(".factor")]
            factors[kind] = np.concatenate([values.floats(name, info_rows(info, name)) for name in names])
    assert len(factors["float"]) == 3 * (128 + 64 + 64 + 64 + 96 + 96 + 64)
    off = {kind: rms(found / factors["float"] - 1) for kind, found in factors.items()}
    # The toy's B A is as large as its W, so the products of both count for much.
    assert off["few bits"] < 0.8 * off["of few bits alone"], off


def info_rows(info: object, name: str) -> int:
    return next(one.shape[0] for one in info.constants if one.name == name)  # type: ignore[attr-defined]


def test_magnitudes_of_a_row_that_is_zero(build_toy: BuildToy, toy_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from bedplate.errors import AdapterError

    adapter = save_trained(
        tmp_path / "adapter", toy_model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    bundle = build_toy(quantize="none", programs=False)
    weight = open_checkpoint(toy_model).tensor("layers.0.self_attn.q_proj.weight")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{prefix}.lora_A.weight"] = torch.zeros_like(tensors[f"{prefix}.lora_A.weight"])
    tensors[f"{prefix}.lora_A.weight"][0] = -weight[5]
    tensors[f"{prefix}.lora_B.weight"] = torch.zeros_like(tensors[f"{prefix}.lora_B.weight"])
    tensors[f"{prefix}.lora_B.weight"][5, 0] = 2 / 8  # the scale is 8 / 2
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 8
    with pytest.raises(AdapterError, match=r"a row of layers\.0\.self_attn\.q_proj is zero"):
        bundle.add(adapter, name="a")
