"""Adapters of models with more tokens than the base, and their tokenizers: as PEFT on a resized model."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import logits_with
from families import make_toy, save_toy, save_trained, with_peft
from peft import LoraConfig
from recorder import Recorder
from safetensors.torch import load_file, save_file
from toy import save_toy_tokenizer
from transformers import AutoTokenizer

import bedplate
from bedplate.errors import AdapterError, UnsupportedError

VOCABULARY, GROWN = 320, 323
TOYS = {"llama": "first", "phi3": "first"}  # tied, and not
TEXT = "the quick <call>brown fox</call> jumps<end>"
FEATURES: dict[str, dict[str, Any]] = {
    "not trained": {},
    "trained in full": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "adapted": {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
    "dora on the head": {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    "trained rows": {"trainable_token_indices": [320, 321, 322]},
}


class Toy:
    def __init__(self, folder: Path, family: str) -> None:
        self.model = folder / "model"
        save_toy(self.model, make_toy(family, TOYS[family], vocab_size=VOCABULARY))
        save_toy_tokenizer(self.model, VOCABULARY)
        self.exact, self.eight = (
            bedplate.build(self.model, folder / f"{name}.bundle", programs=False, quantize=name)
            for name in ("none", "8da8w")
        )

    def save(self, folder: Path, **fields: Any) -> Path:
        fields = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM", **fields}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_trained(folder, self.model, LoraConfig(**fields), tokens=GROWN)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_tokens(["<call>", "</call>"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        tokenizer.save_pretrained(folder)
        return folder

    def peft(self, adapter: Path, ids: list[int]) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return with_peft(self.model, adapter, ids, vocabulary=GROWN)


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp(request.param), request.param)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("feature", FEATURES)
def test_it_computes_what_peft_does_on_the_resized_model(feature: str, toy: Toy, tmp_path: Path) -> None:
    adapter = toy.save(tmp_path / "adapter", **FEATURES[feature])
    ids = AutoTokenizer.from_pretrained(adapter)(TEXT)["input_ids"]
    assert {320, 321, 322} < set(ids)
    expected = toy.peft(adapter, ids)
    assert expected.shape == (len(ids), GROWN)
    for bundle, bound in ((toy.exact, 2e-5), (toy.eight, 0.1)):
        assert bundle.add(adapter, name="a").info.vocab == GROWN
        try:
            merged = logits_with(bundle, "a", toy.model, ids)
            with bedplate.Engine(bundle, kv="float32") as engine:
                assert engine.tokenizer_of("a").encode(TEXT) == ids
                assert set(engine.tokenizer.encode(TEXT)).isdisjoint({320, 321, 322})
                found = torch.from_numpy(engine.session("a").logits(ids))
                assert engine.session().logits([1, 2]).shape == (2, VOCABULARY)
        finally:
            bundle.remove("a")
        assert rms(found - expected) < bound * rms(expected)
        assert rms(merged - expected) < bound * rms(expected)


def test_answers_have_the_text_of_the_further_tokens(toy: Toy, tmp_path: Path) -> None:
    """Of a head that likes nothing but one of them, or nothing but the opposite of it."""
    adapter = toy.save(tmp_path / "adapter")

    def like(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lm_head.weight")]:
            tensors[name] = torch.zeros_like(tensors[name])
            tensors[name][320], tensors[name][321] = 0.1, -0.1

    edit(adapter, like) if not toy.exact.manifest.model["tied_head"] else None
    toy.exact.add(adapter, name="a")
    try:
        with bedplate.Engine(toy.exact) as engine:
            own = engine.tokenizer_of("a")
            assert own.decode([320, 321, 322]) == "<call></call>", "<end> is special"
            if not toy.exact.manifest.model["tied_head"]:
                text = engine.session("a").generate(TEXT, max_tokens=3)
                assert text.startswith(("<call>", "</call>"))
    finally:
        toy.exact.remove("a")


def test_a_conversation_with_further_tokens(toy: Toy, tmp_path: Path) -> None:
    adapter = toy.save(tmp_path / "adapter")
    template = "{% for m in messages %}<call>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template, tokenizer.eos_token = template, "<end>"
    tokenizer.save_pretrained(adapter)
    messages = [{"role": "user", "content": "the fox"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    recorder = Recorder()
    toy.exact.add(adapter, name="a", reporter=recorder)
    try:
        with bedplate.Engine(toy.exact) as engine:
            own = engine.tokenizer_of("a")
            assert own.encode_chat(messages) == expected and 320 in expected and 322 in expected
            spoof = own.encode_chat([{"role": "user", "content": "<end>"}])
            assert spoof.count(322) == 1, "what a message says is no special token"
    finally:
        toy.exact.remove("a")
    assert any("ends a text with <end>" in notice for notice in recorder.notices)


def test_without_a_tokenizer(toy: Toy, tmp_path: Path) -> None:
    adapter, recorder = toy.save(tmp_path / "adapter"), Recorder()
    for file in adapter.glob("*token*"):
        file.unlink()
    toy.exact.add(adapter, name="a", reporter=recorder)
    toy.exact.remove("a")
    assert any("3 tokens more than the base, but no tokenizer" in notice for notice in recorder.notices)


def test_tokens_that_only_the_settings_name(toy: Toy, tmp_path: Path) -> None:
    """As transformers does, they are added to those of tokenizer.json."""
    adapter = toy.save(tmp_path / "adapter")
    shutil.copy(toy.model / "tokenizer.json", adapter)
    (adapter / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"320": {"content": "<call>"}, "321": {"content": "<end>", "special": true}}}'
    )
    expected = AutoTokenizer.from_pretrained(adapter)(TEXT)["input_ids"]
    toy.exact.add(adapter, name="a")
    try:
        with bedplate.Engine(toy.exact) as engine:
            assert engine.tokenizer_of("a").encode(TEXT) == expected and {320, 321} < set(expected)
    finally:
        toy.exact.remove("a")


def edit(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, adapter / "adapter_model.safetensors"
    )


def resized(name: str, rows: int) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            if key.endswith(f"{name}.weight"):
                tensors[key] = tensors[key][:1].repeat(rows, 1)

    return change


def dropped(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(f"{name}.weight")]:
            del tensors[key]

    return change


def both(rows: int) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        resized("embed_tokens", rows)(tensors)
        resized("lm_head", rows)(tensors)

    return change


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (both(321), AdapterError, "its tokenizer has the token '</call>'"),
        (both(300), UnsupportedError, "has 300 tokens, fewer than the 320 of the model"),
        (
            resized("lm_head", 325),
            AdapterError,
            "its embedding and its head have 323 and 325 tokens|different",
        ),
    ],
    ids=["no row", "fewer", "differ"],
)
def test_tables_that_do_not_fit(
    change: Any, kind: type[Exception], says: str, toy: Toy, tmp_path: Path
) -> None:
    adapter = toy.save(tmp_path / "adapter")
    edit(adapter, change)
    with pytest.raises(kind, match=says) as caught:
        toy.exact.add(adapter, name="a")
    assert caught.value.hint and str(adapter) in caught.value.where  # type: ignore[attr-defined]


def test_a_head_that_is_missing(toy: Toy, tmp_path: Path) -> None:
    adapter = toy.save(tmp_path / "adapter")
    edit(adapter, dropped("lm_head"))
    if toy.exact.manifest.model["tied_head"]:
        toy.exact.add(adapter, name="a")  # the head is the embedding
        toy.exact.remove("a")
        return
    with pytest.raises(AdapterError, match="do not hold both the embedding and the head"):
        toy.exact.add(adapter, name="a")
