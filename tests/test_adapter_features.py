"""What a PEFT adapter may do beside a plain LoRA, on two families: PEFT makes it, and computes what is expected."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import logits_with
from families import LENGTH, make_toy, save_toy, save_trained, theirs, with_peft
from peft import LoraConfig
from toy import save_toy_tokenizer

import bedplate
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.stored import stored_linears

VOCABULARY = 320
TOKENS = [3, 7, *torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()]
# Tied, with norms of 1 + w, norms of q and k, a scaled embedding; and untied, with biases, joined linears, another
# order of rows in q and k. The third is for biases of all linears.
TOYS = {"gemma3_text": "first", "glm4": "first", "llama": "biases, untied"}
# Where other rules of a family meet a feature: q, k and v in one linear; a capped head; a scaled embedding, scaled
# residuals and logits; a scaled head after parallel blocks; norms with biases.
OTHERS = {
    "phi3": ("dora", "biases beside B", "lora on both"),
    "gemma2": ("lora on both, tied", "dora on the head", "norms"),
    "granite": ("dora", "lora on both", "tokens", "a head"),
    "cohere2": ("dora on the head", "lora on both", "tokens of both"),
    "stablelm": ("all biases", "norms"),
}


def all_linears(model: Path) -> list[str]:
    return [name.rpartition(".")[2] for name in stored_linears(open_checkpoint(model).spec)]


# Fields of LoraConfig, of each feature. `all`: every linear of a layer.
FEATURES: dict[str, dict[str, Any]] = {
    "dora": {
        "target_modules": "all",
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "dora and biases": {"target_modules": "all", "use_dora": True, "bias": "all"},
    "dora on the head": {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
    "one norm": {"modules_to_save": ["layers.1.input_layernorm"]},
    "a head": {"modules_to_save": ["lm_head"]},
    "an embedding": {"modules_to_save": ["embed_tokens"]},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a tied embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on the head": {"target_modules": ["lm_head", "v_proj", "o_proj"], "rank_pattern": {"lm_head": 3}},
    "lora on the embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "lora on both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "lora on both, tied": {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
    "lora by a pattern": {"target_modules": r".*(o_proj|lm_head)"},
    "tokens": {"trainable_token_indices": [7, 3, 300]},
    "tokens of the embedding": {"trainable_token_indices": {"embed_tokens": [7, 3, 300]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [7, 3, 300]}},
    "tokens of both": {"trainable_token_indices": {"lm_head": [7, 3], "embed_tokens": [7, 3]}},
    "other tokens of both": {"trainable_token_indices": {"lm_head": [7, 3, 300], "embed_tokens": [3, 9]}},
    "biases of adapted linears": {"target_modules": ["o_proj", "down_proj"], "bias": "lora_only"},
    "all biases": {"bias": "all"},
    "biases beside B": {"target_modules": "all", "lora_bias": True},
    "a bias beside the head": {"target_modules": ["lm_head"], "lora_bias": True},
    "layers twice": {"layer_replication": [[0, 2], [1, 4]], "target_modules": ["o_proj", "up_proj"]},
    "layers twice, and dora": {
        "layer_replication": [[2, 4], [0, 1], [2, 3]],
        "target_modules": "all",
        "use_dora": True,
        "modules_to_save": ["norm"],
    },
}
# Where PEFT's adapter is no other than without the option, or cannot be made.
NOT_FOR = {
    "gemma3_text": {"layers twice", "layers twice, and dora", "biases of adapted linears", "all biases"},
}


class Toy:
    def __init__(self, folder: Path, family: str) -> None:
        self.family, self.model = family, folder / "model"
        save_toy(self.model, make_toy(family, TOYS.get(family, "first"), vocab_size=VOCABULARY))
        save_toy_tokenizer(self.model, VOCABULARY)
        self.exact, self.eight = (
            bedplate.build(self.model, folder / f"{name}.bundle", programs=False, quantize=name)
            for name in ("none", "8da8w")
        )
        self.base = theirs(self.model, TOKENS)

    def lora(self, fields: dict[str, Any]) -> LoraConfig:
        fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
        if fields["target_modules"] == "all":
            fields["target_modules"] = all_linears(self.model)
        if self.family == "glm4" and fields["target_modules"] == ["o_proj", "up_proj"]:
            fields["target_modules"] = ["o_proj", "gate_up_proj"]
        return LoraConfig(**fields)

    def save(self, folder: Path, fields: dict[str, Any]) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return save_trained(folder, self.model, self.lora(fields))

    def peft(self, adapter: Path) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return with_peft(self.model, adapter, TOKENS)


@pytest.fixture(scope="module")
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("toy", TOYS, indirect=True, scope="module")
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_what_peft_computes(feature: str, toy: Toy, tmp_path: Path) -> None:
    if feature in NOT_FOR.get(toy.family, ()):
        pytest.skip("this family has no such thing")
    as_peft_does(feature, toy, tmp_path)


@pytest.mark.parametrize(
    ("toy", "feature"),
    [(family, feature) for family, features in OTHERS.items() for feature in features],
    indirect=["toy"],
    scope="module",
)
def test_it_meets_the_rules_of_a_family(feature: str, toy: Toy, tmp_path: Path) -> None:
    as_peft_does(feature, toy, tmp_path)


def as_peft_does(feature: str, toy: Toy, tmp_path: Path) -> None:
    adapter = toy.save(tmp_path / "adapter", FEATURES[feature])
    expected = toy.peft(adapter)
    effect = rms(expected - toy.base)
    assert effect > 0.05
    with added(toy.exact, adapter):
        torch.testing.assert_close(logits(toy.exact), expected, rtol=0, atol=2e-4)
        merged = logits_with(toy.exact, "a", toy.model, TOKENS)  # what `eval` compares with
        torch.testing.assert_close(merged, expected, rtol=0, atol=2e-4)
    with added(toy.eight, adapter):
        off = rms(logits(toy.eight) - expected)
    # Random layers enlarge errors that they pass on, those of Gemma most.
    assert off < 0.1 * rms(expected) and off < 0.2 * effect


@contextmanager
def added(bundle: bedplate.Bundle, adapter: Path) -> Iterator[None]:
    bundle.add(adapter, name="a", programs=False)
    try:
        yield
    finally:
        bundle.remove("a")


def logits(bundle: bedplate.Bundle) -> torch.Tensor:
    with bedplate.Engine(bundle, kv="float32") as engine:
        return torch.from_numpy(engine.session("a").logits(TOKENS))


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
