"""PEFT's own checks of merging and saving (`_test_merge_layers`, `_test_merge_layers_multi`, `_test_save_pretrained…`,
`_test_weighted_combination_of_adapters` of its PeftCommonTester), with bedplate as one more reader of what it saves.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENGTH, make_toy, quiet, save_toy, theirs_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from toy import save_toy_tokenizer

import bedplate
from bedplate.errors import UnsupportedError

pytestmark = pytest.mark.slow

VOCABULARY = 320
TOKENS = [
    3,
    0,
    1,
    *torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist(),
]
TARGETS = {"llama": None, "gemma3_text": None, "phi3": ["qkv_proj", "down_proj", "lm_head"]}
# The LoraConfigs of ALL_CONFIGS in PEFT's tests/test_decoder_models.py, but for aLoRA.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"},
    "tokens": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "trainable_token_indices": [0, 1, 3]},
}
# Those of _test_weighted_combination_of_adapters.
WEIGHTS = ([0.5, 1.5, 1.5], [-0.5, -0.8, -1.2])
# Those of _test_save_pretrained_adapter_name_substring.
NAMES = ("default", "default2", "other_default", "foodefault_bar", "efaul")


class Toy:
    def __init__(self, folder: Path, family: str) -> None:
        self.family, self.folder, self.model = family, folder, folder / "model"
        save_toy(self.model, make_toy(family, vocab_size=VOCABULARY))
        save_toy_tokenizer(self.model, VOCABULARY)
        self.base = theirs_of(self.model)
        self.bundle = self.built(self.model)

    def built(self, model: Path) -> bedplate.Bundle:
        return bedplate.build(model, self.folder / f"{model.name}.bundle", quantize="none", programs=False)

    def adapted(self, configs: Mapping[str, dict[str, Any]]) -> PeftModel:
        """The model with adapters of these fields, all random."""
        made = {name: self.lora(fields) for name, fields in configs.items()}
        first, *others = made
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(self.base), made[first], adapter_name=first)
            for name in others:
                model.add_adapter(name, made[name])
        torch.manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "trainable_tokens" in name:
                    parameter += torch.empty_like(parameter).normal_(0.0, 0.1)
        return model.eval()

    def lora(self, fields: dict[str, Any]) -> LoraConfig:
        return LoraConfig(**{"target_modules": TARGETS[self.family], "task_type": "CAUSAL_LM", **fields})

    def bedplate(self, adapter: str | None, bundle: bedplate.Bundle | None = None) -> Tensor:
        with bedplate.Engine(bundle or self.bundle, kv="float32") as engine:
            return torch.from_numpy(engine.session(adapter).logits(TOKENS))


@pytest.fixture(scope="module", params=TARGETS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def toy(made: Toy) -> Iterator[Toy]:
    yield made
    for name in list(made.bundle.adapters):
        made.bundle.remove(name)


@torch.no_grad()
def logits(model: Any, adapter: str | None = None) -> Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
    return model.eval()(torch.tensor([TOKENS])).logits[0]  # type: ignore[no-any-return]


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("config", CONFIGS)
def test_merge_layers(config: str, toy: Toy, tmp_path: Path) -> None:
    """The adapter beside the base, merged into it, unloaded and saved: the same logits, read either way."""
    model = toy.adapted({"default": CONFIGS[config]})
    expected = logits(model)
    quiet(lambda: model.save_pretrained(tmp_path / "adapter"))
    toy.bundle.add(tmp_path / "adapter", name="a")
    equal(toy.bedplate("a"), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    folder = tmp_path / f"{config}-merged"
    quiet(lambda: merged.save_pretrained(folder))
    save_toy_tokenizer(folder, VOCABULARY)
    torch.testing.assert_close(toy.bedplate(None, toy.built(folder)), expected, rtol=1e-4, atol=1e-4)
    assert float((toy.bedplate(None) - expected).abs().max()) > 0.05


def test_merge_layers_of_several_adapters(toy: Toy, tmp_path: Path) -> None:
    model = toy.adapted({"default": CONFIGS["plain"], "adapter-2": CONFIGS["plain"]})
    quiet(lambda: model.save_pretrained(tmp_path))
    toy.bundle.add_all({"default": tmp_path, "adapter-2": tmp_path / "adapter-2"})
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["adapter-2", "default"])
    toy.bundle.merge({"adapter-2": 1.0, "default": 1.0}, name="both")
    torch.testing.assert_close(toy.bedplate("both"), logits(merged), rtol=1e-4, atol=1e-4)
    for name in ("default", "adapter-2"):
        equal(toy.bedplate(name), logits(model, name))
        toy.bundle.merge({name: 1.0}, name=f"{name}-alone")
        equal(toy.bedplate(f"{name}-alone"), logits(model, name))


def test_trained_tokens_are_not_merged(toy: Toy, tmp_path: Path) -> None:
    """Nor are they in PEFT, if two adapters have the same."""
    model = toy.adapted({"default": CONFIGS["tokens"], "other": CONFIGS["tokens"]})
    quiet(lambda: model.save_pretrained(tmp_path))
    toy.bundle.add_all({"default": tmp_path, "other": tmp_path / "other"})
    with pytest.raises(UnsupportedError, match="has trained tokens, which cannot be summed"):
        toy.bundle.merge({"default": 1.0, "other": 1.0}, name="both")
    with pytest.raises(ValueError, match="token"):
        model.merge_and_unload(adapter_names=["default", "other"])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weighted_combination_of_adapters(weights: list[float], toy: Toy, tmp_path: Path) -> None:
    plain = CONFIGS["plain"]
    model = toy.adapted({"adapter_1": plain, "adapter_2": plain, "adapter_3": {**plain, "r": 20}})
    sums = {"single": (["adapter_1"], weights[:1]), "cat": (["adapter_2", "adapter_3"], weights[1:])}
    for name, (adapters, own) in sums.items():
        model.add_weighted_adapter(adapters, own, name, combination_type="cat")
    quiet(lambda: model.save_pretrained(tmp_path))
    toy.bundle.add_all({name: tmp_path / name for name in ("adapter_1", "adapter_2", "adapter_3")})
    for name, (adapters, own) in sums.items():
        expected = logits(model, name)
        entry = toy.bundle.merge(dict(zip(adapters, own, strict=True)), name=name)
        equal(toy.bedplate(name), expected)
        assert entry.info.rank == (28 if name == "cat" else 8)
        toy.bundle.add(tmp_path / name, name=f"{name}-of-peft")
        equal(toy.bedplate(f"{name}-of-peft"), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("config", CONFIGS)
def test_save_pretrained_of_some_adapters(config: str, safe: bool, toy: Toy, tmp_path: Path) -> None:
    """Each has its own tensors, whatever its name has in common with others."""
    model = toy.adapted(dict.fromkeys(NAMES, CONFIGS[config]))
    quiet(lambda: model.save_pretrained(tmp_path, safe_serialization=safe, selected_adapters=list(NAMES[:3])))
    assert (tmp_path / "adapter_model.safetensors").exists() == safe
    toy.bundle.add_all({name: tmp_path / ("" if name == "default" else name) for name in NAMES[:3]})
    found = {name: toy.bedplate(name) for name in NAMES[:3]}
    for name, ours in found.items():
        equal(ours, logits(model, name))
    assert len({float(one.sum()) for one in found.values()}) == 3
