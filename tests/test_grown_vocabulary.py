"""Adapters of models with more tokens than the base, and their tokenizers: as PEFT on a resized model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import logits_with
from grown import GROWN, TEXT, VOCABULARY, Toy, edit, likes_further_tokens
from recorder import Recorder
from transformers import AutoTokenizer

import bedplate
from bedplate.assemble.verify import verify_bundle
from bedplate.errors import AdapterError, UnsupportedError

TOYS = ("llama", "phi3")  # tied, and not
FEATURES: dict[str, dict[str, Any]] = {
    "not trained": {},
    "trained in full": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "the head in full": {"modules_to_save": ["lm_head"]},
    "the embedding in full": {"modules_to_save": ["embed_tokens"]},
    "one table in full": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted": {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
    "dora on the head": {"target_modules": ["lm_head", "o_proj"], "use_dora": True},
    "trained rows": {"trainable_token_indices": [310, 311, 312]},
}


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("untied"), "phi3")


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("feature", FEATURES)
def test_it_computes_what_peft_does_on_the_resized_model(feature: str, toy: Toy, tmp_path: Path) -> None:
    adapter = toy.save(tmp_path / "adapter", **FEATURES[feature])
    ids = AutoTokenizer.from_pretrained(adapter)(TEXT)["input_ids"]
    assert {310, 311, 312} < set(ids)
    if feature.endswith("on the head") and not toy.tied:
        with pytest.raises(AdapterError, match="do not hold both the embedding and the head"):
            toy.exact.add(adapter, name="a")  # nobody knows the rows that PEFT has not saved
        return
    expected = toy.peft(adapter, ids)
    assert expected.shape == (len(ids), GROWN)
    for bundle, bound in ((toy.exact, 2e-5), (toy.eight, 0.1)):
        assert bundle.add(adapter, name="a").info.vocab == GROWN
        try:
            merged = logits_with(bundle, "a", toy.model, ids)
            with bedplate.Engine(bundle, kv="float32") as engine:
                assert engine.tokenizer_of("a").encode(TEXT) == ids
                assert set(engine.tokenizer.encode(TEXT)).isdisjoint({310, 311, 312})
                found = torch.from_numpy(engine.session("a").logits(ids))
                assert engine.session().logits([1, 2]).shape == (2, VOCABULARY)
        finally:
            bundle.remove("a")
        assert rms(found - expected) < bound * rms(expected)
        assert rms(merged - expected) < bound * rms(expected)


def test_text_of_the_further_tokens(toy: Toy, tmp_path: Path) -> None:
    toy.exact.add(toy.save(tmp_path / "adapter"), name="a")
    try:
        with bedplate.Engine(toy.exact) as engine:
            own = engine.tokenizer_of("a")
            assert own.decode([310, 311, 312]) == "<call></call>", "<end> is special"
            session = engine.session("a")
            session.generate(TEXT, max_tokens=1)
            assert list(session.tokens[: len(own.encode(TEXT))]) == own.encode(TEXT)
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
            assert own.encode_chat(messages) == expected and 310 in expected and 312 in expected
            spoof = own.encode_chat([{"role": "user", "content": "<end>"}])
            assert spoof.count(312) == 1, "what a message says is no special token"
            assert own.end_ids == {1, 312} and engine.tokenizer.end_ids == {1}
    finally:
        toy.exact.remove("a")
    assert recorder.notices == []


def test_answers_end_at_its_own_end_token(untied: Toy, tmp_path: Path) -> None:
    """And have the text of its tokens."""
    adapter = edit(untied.save(tmp_path / "a"), likes_further_tokens)
    untied.exact.add(adapter, name="a")
    try:
        with bedplate.Engine(untied.exact) as engine:
            liked = engine.session("a").generate(TEXT, max_tokens=1)
            assert liked in ("<call>", "</call>")
            tokenizer = AutoTokenizer.from_pretrained(adapter)
            tokenizer.eos_token = liked
            tokenizer.save_pretrained(adapter)
            untied.exact.add(adapter, name="b")
            session = engine.session("b")
            assert session.generate(TEXT, max_tokens=3) == "" and session.last is not None
            assert (session.last.finish_reason, session.last.generated_tokens) == ("stop", 0)
    finally:
        for name in list(untied.exact.adapters):
            untied.exact.remove(name)


@pytest.mark.parametrize("through", ["the same bundle", "another object"])
def test_an_adapter_that_takes_the_name_of_another(through: str, untied: Toy, tmp_path: Path) -> None:
    """An answer that has begun goes on in the words in which it began."""
    one = edit(untied.save(tmp_path / "a"), likes_further_tokens)
    other = edit(untied.save(tmp_path / "b", tokens=("<talk>", "</talk>")), likes_further_tokens)
    untied.exact.add(one, name="a")
    try:
        with bedplate.Engine(untied.exact) as engine:
            session = engine.session("a")
            pieces = session.generate(TEXT, max_tokens=5, stream=True)
            text = next(pieces)
            bundle = untied.exact
            if through == "another object":
                bundle = bedplate.Bundle.open(bundle.path)
            bundle.remove("a")
            bundle.add(other, name="a")
            assert engine.tokenizer_of("a").encode("<talk>") == [310]
            assert "talk>" in engine.session("a").generate(TEXT, max_tokens=5)
            text += "".join(pieces)
            assert text.count("call>") == 5 and "talk>" not in text
            assert "talk>" in session.generate(TEXT, max_tokens=5)
    finally:
        untied.exact.refresh()
        untied.exact.remove("a")


def test_an_adapter_of_further_tokens_alone_has_an_effect(untied: Toy, tmp_path: Path) -> None:
    """Though the logits of all other tokens are those of the base."""

    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "lora_B" in name]:
            tensors[name] = torch.zeros_like(tensors[name])

    untied.exact.add(edit(untied.save(tmp_path / "adapter"), forget), name="a")
    try:
        (effect,) = verify_bundle(untied.exact, programs=False, threads=1).effects
        assert effect.took_effect and (effect.max_difference, effect.further_tokens) == (0.0, 3)
    finally:
        untied.exact.remove("a")


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
        '{"added_tokens_decoder": {"310": {"content": "<call>"}, "311": {"content": "<end>", "special": true}}}'
    )
    expected = AutoTokenizer.from_pretrained(adapter)(TEXT)["input_ids"]
    toy.exact.add(adapter, name="a")
    try:
        with bedplate.Engine(toy.exact) as engine:
            assert engine.tokenizer_of("a").encode(TEXT) == expected and {310, 311} < set(expected)
    finally:
        toy.exact.remove("a")


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
        (both(311), AdapterError, "its tokenizer has the token '</call>'"),
        (both(300), UnsupportedError, "has 300 tokens, fewer than the 310 of the model"),
        (
            resized("lm_head", 315),
            AdapterError,
            "its embedding and its head have 313 and 315 tokens|different",
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
    if toy.tied:
        toy.exact.add(adapter, name="a")  # the head is the embedding
        toy.exact.remove("a")
        return
    with pytest.raises(AdapterError, match="do not hold both the embedding and the head"):
        toy.exact.add(adapter, name="a")
