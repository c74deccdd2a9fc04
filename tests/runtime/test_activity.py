"""What an engine says of the generations that it computes."""

from __future__ import annotations

import bedplate

LONG = "the quick brown fox jumps over the lazy dog and runs away " * 3


def test_activity(toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle, threads=1, cache_bytes=0, lookup=False, max_step_rows=8) as engine:
        assert engine.activity().running == [] and engine.activity().steps == 0
        session, other = engine.session(), engine.session({"all": 0.5})
        events = session.events("the fox", max_tokens=20, ignore_eos=True)
        begun = other.events(LONG, max_tokens=2)
        prompt = len(engine.tokenizer.encode("the fox"))
        next(events)
        first, second = sorted(engine.activity().running, key=lambda one: len(one.adapters))
        assert (first.adapters, first.prompt_tokens, first.read_tokens) == ({}, prompt, prompt)
        assert 1 <= first.generated_tokens < 20
        assert second.adapters == {"all": 0.5} and second.generated_tokens == 0
        assert 0 <= second.read_tokens < second.prompt_tokens
        del begun
        assert [one.adapters for one in engine.activity().running] == [{}]
        list(events)
        activity = engine.activity()
        assert activity.running == [] and activity.steps >= 20 and activity.rows >= prompt + 19


def test_rows_are_tokens_that_steps_compute(toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle, threads=1, cache_bytes=0, lookup=False) as engine:
        session = engine.session("all")
        session.generate("the fox", max_tokens=5, ignore_eos=True)
        prompt = len(engine.tokenizer.encode("the fox"))
        assert (engine.activity().steps, engine.activity().rows) == (5, prompt + 4)
