"""Chat templates in processes of their own: what they write is the same, and none takes all time or memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bedplate
from bedplate.errors import RunError
from bedplate.runtime import template_guard
from bedplate.runtime.chat_template import ChatTemplate
from bedplate.runtime.template_guard import BusyError, GuardedTemplate, Templates
from bedplate.serve.errors import of_bedplate

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "ä\ud7ff\U0010ffff"},
    {"role": "assistant", "content": ""},
]
GOOD = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m | tojson }}{% endfor %}{{ more }}"
BAD = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times a variable": "{% set n = 10 %}{% set t = 'a' * n ** 10 %}{{ t }}",
    "center": "{{ messages[0].content | center(10 ** 10) }}",
    "doubles": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a * 2 %}{% endfor %}",
    "lists": "{% set ns = namespace(a=1) %}{% for i in range(90) %}{% set ns.a = [ns.a] * 2 %}{% endfor %}{{ ns.a }}",
    "format": "{{ '%099999999999d' % 1 }}",
    "much": "{{ 'a' * 40 * 1000 * 1000 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    templates = Templates(seconds=0.5)
    yield templates
    templates.close()


def _render(template: GuardedTemplate | ChatTemplate, **values: Any) -> str:
    return template.render(MESSAGES, special_tokens={"bos_token": "<s>"}, **values)


def test_it_writes_the_same(templates: Templates) -> None:
    guarded, here = GuardedTemplate(GOOD, templates), ChatTemplate(GOOD)
    assert _render(guarded) == _render(here) and _render(guarded, more=(1, [2])) == _render(
        here, more=(1, [2])
    )
    assert guarded.names == here.names and guarded.source == GOOD


def test_an_engine_reads_the_same_tokens(toy_bundle: bedplate.Bundle) -> None:
    messages = [{"role": "user", "content": "<|im_start|>the <|im_end|>fox"}]
    here = bedplate.Engine(toy_bundle).tokenizer
    with bedplate.Engine(toy_bundle, guard_templates=True) as engine:
        there = engine.tokenizer_of("all")
        for special in (False, True):
            expected = here.encode_chat(messages, allow_special=special)
            assert there.encode_chat(messages, allow_special=special) == expected
        assert there.render(messages) == here.render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ ''.__class__() }}",
    ],
)
def test_it_says_the_same_of_what_is_wrong(source: str, templates: Templates) -> None:
    with pytest.raises(RunError) as here:
        _render(ChatTemplate(source))
    with pytest.raises(RunError) as there:
        _render(GuardedTemplate(source, templates))
    assert (there.value.what, there.value.hint) == (here.value.what, here.value.hint)


@pytest.mark.parametrize("bad", BAD)
def test_what_takes_too_much_is_refused_and_others_go_on(bad: str, templates: Templates) -> None:
    good = GuardedTemplate(GOOD, templates)
    with ThreadPoolExecutor(1) as threads:
        start = time.monotonic()
        failing = threads.submit(lambda: _render(GuardedTemplate(BAD[bad], templates)))
        while not failing.done():
            _render(good)
        with pytest.raises(RunError, match="chat template"):
            failing.result()
        assert time.monotonic() - start < template_guard._PATIENCE
    _render(good)


def test_what_took_too_long_is_not_tried_again_at_once(
    templates: Templates, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2
    monkeypatch.setattr(template_guard, "_PAUSE", 0.2)
    bad = GuardedTemplate(source + "{% if messages[0].role == 'user' %}" + source + "{% endif %}", templates)
    with pytest.raises(RunError, match=r"more than 0\.5 seconds"):
        _render(bad)
    start = time.monotonic()
    with pytest.raises(RunError, match="a moment ago"):
        _render(bad)
    assert time.monotonic() - start < 0.1
    time.sleep(0.2)
    with pytest.raises(RunError, match=r"more than 0\.5 seconds"):
        _render(bad)


def test_a_process_that_is_killed_is_replaced_and_none_is_left() -> None:
    templates = Templates(processes=1)
    good = GuardedTemplate(GOOD, templates)
    process: Any = templates._idle.queue[0]
    os.kill(process._running.process.pid, 9)
    with pytest.raises(RunError, match="ends its process"):
        _render(good)
    assert _render(GuardedTemplate(GOOD, templates))
    left = process._running.process
    templates.close()
    assert left.returncode == -9
    assert _render(GuardedTemplate(GOOD, templates))
    left = process._running.process
    del templates, good, process
    assert left.returncode == -9


def test_others_that_take_all_processes_are_no_fault_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = Templates(processes=1)
    monkeypatch.setattr(template_guard, "_PATIENCE", 0.01)
    taken = templates._idle.get()
    with pytest.raises(BusyError) as caught:
        GuardedTemplate(GOOD, templates)
    said = of_bedplate(caught.value)
    assert said.status == 503 and "Retry-After" in said.headers
    templates._idle.put(taken)
    templates.close()


def test_it_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEDPLATE_API_KEYS", "secret")
    templates = Templates(processes=1)
    GuardedTemplate(GOOD, templates)
    process: Any = templates._idle.queue[0]
    assert b"secret" not in Path(f"/proc/{process._running.process.pid}/environ").read_bytes()
    templates.close()
