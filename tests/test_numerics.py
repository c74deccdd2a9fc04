"""What a bundle computes against transformers + PEFT (float) and against the eager quantized model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from eager import check_quantized, eager_decoder, eager_logits
from safetensors.torch import load_file, save_file
from toy import BuildToy, reference, save_adapter, save_toy_model, toy_config

from bedplate import Bundle, Engine
from bedplate.bundle.ptd import read_ptd
from bedplate.bundle.usage import BASE, sharing
from bedplate.oracle import stock_program

# quantize/test_choice.py and assemble/test_no_programs.py build the same structure.
RECOVERED = {"recovery_rank": 4, "overrides": {"layers.*.self_attn.v_proj": "8da8w"}}
TOKENS = [int(token) for token in np.random.default_rng(0).integers(2, 320, 90)]


@pytest.mark.parametrize("name", [None, "all", "qv"])
def test_float_bundle_equals_transformers_and_peft(
    name: str | None, float_bundle: Bundle, toy_model: Path, toy_adapters: dict[str, Path]
) -> None:
    model = reference(toy_model, None if name is None else toy_adapters[name])
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    with Engine(float_bundle, threads=1, kv="float32") as engine:
        prefilled = engine.session(name).logits(TOKENS)
        session = engine.session(name)
        stepped = np.stack([session.step([token]) for token in TOKENS])
    # float32 sums in another order: some 1e-7 of the largest logit for each of a few hundred additions.
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(prefilled, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(stepped, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [None, "all", "all2", "all8"])
def test_quantized_bundle_equals_eager_quantized_model(
    name: str | None, toy_bundle: Bundle, toy_model: Path, toy_adapters: dict[str, Path]
) -> None:
    quantize = "8w" if name == "all8" else "none"
    adapter = None if name is None else toy_adapters[name.removesuffix("8")]
    decoder = eager_decoder(toy_model, toy_bundle, adapter, quantize)
    expected = eager_logits(decoder, TOKENS).numpy()
    logits = stock_program(toy_bundle, name or BASE).logits(TOKENS)
    # Both quantize activations to 8 bits, and where one lies on the border of two codes they may choose
    # differently: rare steps of 1/255 of a row's range, of which a few get through.
    difference = np.abs(logits - expected)
    assert np.median(difference) < 0.02 * expected.std()
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    with Engine(toy_bundle, threads=1) as engine:
        check_quantized(engine.session(name).logits(TOKENS), decoder, TOKENS)


@pytest.fixture(scope="module")
def recovered(build_toy: BuildToy, toy_adapters: dict[str, Path], unit_cache: Path) -> Bundle:
    """With offsets and recovered directions, beside linears of 8 bits that have none; and the adapter `all`."""
    bundle = build_toy(**RECOVERED)
    bundle.add(toy_adapters["all"], name="all", quantize="none", unit_cache=unit_cache)
    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "all"])
def test_recovery_stands_beside_adapters(
    name: str | None, recovered: Bundle, toy_model: Path, toy_adapters: dict[str, Path]
) -> None:
    """Offsets and recovered directions in the program, and in the eager model that is quantized the same way."""
    adapter = None if name is None else toy_adapters[name]
    assert any("correction" in c.name for c in recovered.foundation_info.constants)
    assert not any("correction" in c.name for e in recovered.adapters.values() for c in e.info.constants)
    decoder = eager_decoder(toy_model, recovered, adapter)
    expected = eager_logits(decoder, TOKENS).numpy()
    logits = stock_program(recovered, name or BASE).logits(TOKENS)
    # As above: both quantize activations to 8 bits, and where one lies between two codes they may choose differently.
    assert np.median(np.abs(logits - expected)) < 0.02 * expected.std()
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    with Engine(recovered, threads=1) as engine:
        check_quantized(engine.session(name).logits(TOKENS), decoder, TOKENS)


@pytest.mark.slow
def test_a_recovered_foundation_is_the_same_built_twice(
    recovered: Bundle, build_toy: BuildToy, tmp_path: Path
) -> None:
    again = build_toy(**RECOVERED)
    assert again.manifest == dataclasses.replace(recovered.manifest, adapters={})
    text = tmp_path / "text.txt"
    text.write_text(
        "other words make other activations: quick brown dogs, lazy foxes and five dozen liquor jugs. " * 9
    )
    assert build_toy(**RECOVERED, calibration=text).manifest != again.manifest


def test_adapters_whose_b_differs_by_a_factor_give_what_they_give_alone(
    build_toy: BuildToy, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    """Equal codes, different scales: one must not be taken for the other."""
    quadruple = tmp_path / "quadruple"
    shutil.copytree(toy_adapters["all"], quadruple)
    weights = load_file(quadruple / "adapter_model.safetensors")
    save_file(
        {name: 4 * value if "lora_B" in name else value for name, value in weights.items()},
        quadruple / "adapter_model.safetensors",
    )
    bundle = build_toy()
    bundle.add(toy_adapters["all"], name="once", quantize="8w", unit_cache=unit_cache)
    bundle.add(quadruple, name="four", quantize="8w", unit_cache=unit_cache)
    codes = {
        name: {
            c.name: c.key
            for c in bundle.adapters[name].info.constants
            if c.name.endswith("lora_b.weight#codes")
        }
        for name in ("once", "four")
    }
    data = {name: read_ptd(bundle.adapters[name].weights) for name in codes}
    some = "layers.0.mlp.up_proj.lora_b.weight#codes"
    assert np.array_equal(data["once"].data(codes["once"][some]), data["four"].data(codes["four"][some]))

    alone = {}
    for name in ("once", "four"):
        with Engine(bundle) as engine:
            alone[name] = engine.session(name).logits(TOKENS)
    with Engine(bundle) as engine:
        first, second = engine.session("once"), engine.session("four")
        together = {"once": first.logits(TOKENS), "four": second.logits(TOKENS)}
        again = first.logits(TOKENS)
    assert not np.array_equal(alone["once"], alone["four"])
    for name in alone:
        assert np.array_equal(alone[name], together[name])
    assert np.array_equal(again, alone["once"])


@pytest.mark.slow
def test_identical_bytes_on_both_sides_of_the_border_load_and_run(
    build_toy: BuildToy, unit_cache: Path, tmp_path: Path
) -> None:
    """Zero biases, equal norms, an A that is the base's own o_proj: the adapter leaves out what is there."""
    model = save_toy_model(tmp_path / "model", toy_config(attention_bias=True), seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            if name.endswith("bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path / "model")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "model", seed=8, rank=64, targets=["o_proj"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    state = model.state_dict()
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn"
        weights[f"base_model.model.{prefix}.o_proj.lora_A.weight"] = state[f"{prefix}.o_proj.weight"].clone()
    save_file(weights, file)
    bundle = build_toy(tmp_path / "model", quantize="none")
    bundle.add(adapter, name="border", unit_cache=unit_cache)

    own = {constant.name for constant in bundle.adapters["border"].info.constants}
    assert own == {f"layers.{layer}.self_attn.o_proj.lora_b.weight" for layer in range(3)}
    assert sharing(bundle).programs[1].from_foundation > 0
    with torch.no_grad():
        expected = reference(tmp_path / "model", adapter)(torch.tensor([TOKENS])).logits[0].numpy()
    with Engine(bundle, kv="float32") as engine:
        logits = engine.session("border").logits(TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bundles_built_twice_are_byte_identical(
    build_toy: BuildToy, toy_bundle: Bundle, toy_adapters: dict[str, Path], unit_cache: Path
) -> None:
    again = build_toy()
    before = again.foundation.read_bytes()
    again.add(toy_adapters["all"], name="all", quantize="none", unit_cache=unit_cache)
    assert again.foundation.read_bytes() == before
    for path in (
        "foundation.ptd",
        "foundation.json",
        "base.pte",
        "adapters/all/program.pte",
        "adapters/all/weights.ptd",
    ):
        assert (again.path / path).read_bytes() == (toy_bundle.path / path).read_bytes(), path
