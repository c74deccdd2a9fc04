"""Commands with an adapter that has a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Command
from grown import TEXT, Toy
from transformers import AutoTokenizer

import bedplate


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Its bundle of floats has the adapter `a`."""
    folder = tmp_path_factory.mktemp("own")
    toy = Toy(folder, "phi3")
    adapter = toy.save(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = "{% for m in messages %}<call>{{ m.content }}<end>{% endfor %}"
    tokenizer.save_pretrained(adapter)
    toy.exact.add(adapter, name="a")
    return toy


def count(toy: Toy, adapter: str | None, text: str) -> int:
    with bedplate.Engine(toy.exact) as engine:
        return len(engine.tokenizer_of(adapter).encode(text))


def test_run(command: Command, toy: Toy) -> None:
    of_adapter, of_base = count(toy, "a", TEXT), count(toy, None, TEXT)
    assert of_adapter < of_base
    for options, expected in (((), of_base), (("--adapter", "a"), of_adapter)):
        ran = command("run", toy.exact.path, "--raw", "-p", TEXT, "--max-tokens", 2, "--json", *options)
        assert ran.json()["statistics"]["prompt_tokens"] == expected


def test_chat(command: Command, toy: Toy) -> None:
    said = command("chat", toy.exact.path, "--max-tokens", 2, stdin="/use a\nthe fox\n")
    assert said.code == 0 and f"{count(toy, 'a', '<call>the fox<end>')} prompt tokens" in said.err


def test_eval(toy: Toy, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    found = bedplate.evaluate(toy.exact, toy.model, text, kv="float32")
    assert [one.positions for one in found] == [count(toy, name, TEXT) for name in (None, "a")]
    for one in found:
        assert abs(one.mean_kl) < 1e-6 and abs(one.nll - one.float_nll) < 1e-4 and one.top1 == 1.0
