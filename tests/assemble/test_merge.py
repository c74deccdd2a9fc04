"""`merge`: the weighted sum of adapters of a bundle, beside PEFT's own."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from families import save_trained, theirs_of
from peft import LoraConfig, PeftModel
from recorder import Recorder
from toy import BuildToy

from bedplate import Bundle, Engine
from bedplate.bundle.named import NamedConstants
from bedplate.bundle.values import Values
from bedplate.errors import AdapterError, BedplateError, NameTakenError, NotFoundError, UnsupportedError
from bedplate.runtime.model_spec import read_spec

TOKENS = [5, 17, 101, 3, 250, 77, 8, 8, 19, 300, 2, 45]
ADAPTERS: dict[str, LoraConfig] = {
    "a": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "lm_head", "embed_tokens"],
        rank_pattern={"lm_head": 2},
    ),
    "b": LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj", "lm_head"]),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "norms": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "biases": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "twice": LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 3), (1, 3)]),
    "activated": LoraConfig(
        r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 17], task_type="CAUSAL_LM"
    ),
    "head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.fixture(scope="module")
def folders(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: save_trained(folder / name, toy_model, config) for name, config in ADAPTERS.items()}


@pytest.fixture(scope="module")
def bundle(build_toy: BuildToy, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("merge") / "toy.bundle"
    bundle = build_toy(out=out, quantize="none", programs=False)
    bundle.add_all(folders)
    bundle.add_all({f"{name}8": folders[name] for name in "ab"}, quantize="8w")
    return bundle


def logits(bundle: Bundle, name: str | None) -> np.ndarray:
    with Engine(bundle, kv="float32") as engine:
        return engine.session(name).logits(TOKENS)


def with_peft(model: Path, folders: dict[str, Path], weights: dict[str, float]) -> np.ndarray:
    first, *others = weights
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(theirs_of(model), folders[first], adapter_name=first)
        for other in others:
            peft.load_adapter(folders[other], adapter_name=other)
        peft.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type="cat")
        peft.set_adapter("sum")
        return peft.eval()(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"b": -1.5, "a": 2}], ids=str)
def test_the_sum_is_that_of_peft(
    weights: dict[str, float], bundle: Bundle, folders: dict[str, Path], toy_model: Path
) -> None:
    info = bundle.merge(weights, name="sum").info
    try:
        expected = with_peft(toy_model, folders, weights)
        found = logits(bundle, "sum")
    finally:
        bundle.remove("sum")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert (info.rank, info.dtype) == (7, "float32")
    assert info.ranks == {"self_attn.q_proj": 7, "self_attn.v_proj": 4, "mlp.down_proj": 3}
    for name in (None, *weights):
        assert np.abs(logits(bundle, name) - expected).max() > 0.1


def test_a_sum_of_adapters_in_8_bits_rounds_nothing(bundle: Bundle) -> None:
    """Of the weights. An adapter in 8 bits rounds its inputs too, the sum does not."""
    bundle.merge({"a8": 1.0}, name="same")
    bundle.merge({"a8": 0.25, "b8": 1.0}, name="sum")
    try:
        same, alone = logits(bundle, "same"), logits(bundle, "a8")
        assert np.square(same - alone).mean() < 0.02**2 * np.square(alone).mean()
        path, read = "layers.1.self_attn.q_proj", {}
        for name in ("a8", "b8", "sum"):
            info = bundle.adapters[name].read_info()
            with NamedConstants(bundle.adapters[name].weights, info.constants) as constants:
                values = Values(constants, read_spec(bundle), info.ranks)
                read[name] = [values.matrix(f"{path}.{half}.weight") for half in ("lora_a", "lora_b")]
        (a, b), (a8, b8), (a_of_b, b_of_b) = read["sum"], read["a8"], read["b8"]
        np.testing.assert_array_equal(a, np.concatenate([a8, a_of_b]))
        np.testing.assert_array_equal(b, np.concatenate([b8 * np.float32(0.25), b_of_b], axis=1))
    finally:
        bundle.remove("same")
        bundle.remove("sum")


def test_a_sum_can_be_rounded_to_8_bits(bundle: Bundle) -> None:
    entry = bundle.merge({"a": 0.7, "b": 0.3}, name="sum", quantize="8w")
    exact = bundle.merge({"a": 0.7, "b": 0.3}, name="exact")
    try:
        assert entry.info.dtype == "8w" and entry.nbytes < exact.nbytes / 2
        off = logits(bundle, "sum") - logits(bundle, "exact")
        assert 0 < np.abs(off).max() < 0.1 * np.abs(logits(bundle, "exact")).max()
    finally:
        bundle.remove("sum")
        bundle.remove("exact")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("dora", "DoRA"),
        ("norms", "norms of its own"),
        ("tokens", "trained tokens"),
        ("biases", "trained biases"),
        ("twice", "layers that are used more than once"),
        ("head", "a head of its own"),
        ("activated", r"an invocation \(activated LoRA\)"),
    ],
)
def test_what_cannot_be_summed(name: str, what: str, bundle: Bundle) -> None:
    refused(bundle, {"a": 1.0, name: 0.5}, UnsupportedError, f"{name} has {what}, which cannot be summed")


@pytest.mark.parametrize(
    ("weights", "kind", "says"),
    [
        ({"a": 1.0, "nobody": 1.0}, NotFoundError, "no adapter 'nobody'"),
        ({"a": float("nan")}, AdapterError, "the weight of a must be a number, got nan"),
        ({"a": float("inf")}, AdapterError, "the weight of a must be a number"),
        ({"a": True}, AdapterError, "the weight of a must be a number, got True"),
        ({"a": "much"}, AdapterError, "the weight of a must be a number, got 'much'"),
        ({}, AdapterError, "nothing to merge"),
        ({"a": 0.0}, AdapterError, "it changes nothing"),
        ({"a": 1e30}, AdapterError, "too large for float32"),
    ],
)
def test_weights_that_are_wrong(
    weights: dict[str, float], kind: type[BedplateError], says: str, bundle: Bundle
) -> None:
    if weights.get("a") == 1e30:
        bundle.merge({"a": 1e20}, name="large", allow_noop=True)
        weights = {"large": 1e25}
    try:
        refused(bundle, weights, kind, says)
    finally:
        if "large" in bundle.adapters:
            bundle.remove("large")


def test_the_name_of_a_sum(bundle: Bundle) -> None:
    with pytest.raises(NameTakenError):
        bundle.merge({"a": 1.0, "b": 1.0}, name="a")
    with pytest.raises(AdapterError, match="cannot be the name"):
        bundle.merge({"a": 1.0}, name="a/b")


def test_text_of_a_sum(build_toy: BuildToy, folders: dict[str, Path], tmp_path: Path) -> None:
    bundle, recorder = build_toy(quantize="none", programs=False), Recorder()
    (folders["a"] / "chat_template.jinja").write_text("{{ messages[0].content }}")
    try:
        bundle.add_all({"a": folders["a"], "same": folders["a"], "b": folders["b"]})
    finally:
        (folders["a"] / "chat_template.jinja").unlink()
    alike = bundle.merge({"a": 0.5, "same": 0.5}, name="alike", reporter=recorder)
    assert (alike.folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert recorder.notices == []
    other = bundle.merge({"a": 0.5, "b": 0.5}, name="other", reporter=recorder)
    assert not (other.folder / "chat_template.jinja").exists()
    assert any("different chat templates" in notice for notice in recorder.notices)


def refused(bundle: Bundle, weights: dict[str, float], kind: type[BedplateError], says: str) -> None:
    before = sorted(bundle.path.rglob("*"))
    with pytest.raises(kind, match=says) as caught:
        bundle.merge(weights, name="sum")
    assert caught.value.where is not None and caught.value.hint
    assert sorted(bundle.path.rglob("*")) == before
