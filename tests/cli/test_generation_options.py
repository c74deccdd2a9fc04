"""The options of a generation, of `run`, `chat` and the lines of a file: those of `Session.events`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from command_line import Command, failed

import bedplate
from bedplate.cli.options import GENERATION
from bedplate.runtime.request import Options
from bedplate.runtime.sampling import Sampling


def test_all_are_there_under_their_names() -> None:
    assert {field.name for field in dataclasses.fields(Sampling)} < set(GENERATION)
    assert set(GENERATION) - {"max_tokens"} < set(Options.__annotations__)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--logit-bias", "70=100,71=-2.5"), {"logit_bias": {70: 100.0, 71: -2.5}}),
        (
            ("--banned-tokens", "5,6", "--temperature", 9, "--seed", 1),
            {"banned_tokens": [5, 6], "temperature": 9, "seed": 1},
        ),
        (("--logit-bias", "1=100", "--min-tokens", 5), {"logit_bias": {1: 100.0}, "min_tokens": 5}),
        (("--logit-bias", "1=100", "--ignore-eos"), {"logit_bias": {1: 100.0}, "ignore_eos": True}),
        (
            ("--temperature", 3, "--seed", 7, "--top-k", 20, "--min-p", 0.01),
            {"temperature": 3, "seed": 7, "top_k": 20, "min_p": 0.01},
        ),
        (
            ("--repetition-penalty", 1.5, "--presence-penalty", 1, "--frequency-penalty", 1),
            {"repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_does_what_it_does_in_python(
    command: Command, toy_bundle: bedplate.Bundle, options: tuple[Any, ...], same: dict[str, Any]
) -> None:
    with bedplate.Engine(toy_bundle) as engine:
        session = engine.session("all")
        text = session.generate("the fox", max_tokens=12, **same)
        expected = vars(session.last)
    found = command(
        "run",
        toy_bundle.path,
        "--raw",
        "-p",
        "the fox",
        "--adapter",
        "all",
        "--max-tokens",
        12,
        *options,
        "--json",
    ).json()
    assert found["text"] == text
    for name in ("generated_tokens", "finish_reason"):
        assert found["statistics"][name] == expected[name]


def test_a_scale(command: Command, toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle) as engine:
        session = engine.session()
        session.use("all", scale=0.25)
        expected = session.generate("the fox", max_tokens=12)
    args = ("run", toy_bundle.path, "--raw", "-p", "the fox", "--max-tokens", 12, "--adapter", "all")
    assert command(*args, "--scale", 0.25).out == expected + "\n" != command(*args).out
    failed(command("run", toy_bundle.path, "-p", "x", "--scale", 0.25), "the base has nothing to scale")


@pytest.mark.parametrize("name", ["run", "chat"])
def test_mistakes(command: Command, toy_bundle: bedplate.Bundle, name: str) -> None:
    prompt = ("-p", "x") if name == "run" else ()
    for options, words in (
        (("--logit-bias", "x=1"), "--logit-bias has 'x'"),
        (("--logit-bias", "1"), "--logit-bias has ''"),
        (("--logit-bias", "1=101"), "logit_bias[1] is 101.0"),
        (("--banned-tokens", "1,,2"), "--banned-tokens has ''"),
        (("--banned-tokens=-1",), "not in the vocabulary"),
        (("--min-tokens", 20, "--max-tokens", 10), "min_tokens is 20"),
        (("--temperature", -1), "temperature"),
    ):
        failed(command(name, toy_bundle.path, *prompt, *options), words)
