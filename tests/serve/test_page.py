"""The page at `/`, in a browser: what it asks for, and what it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from typing import Any

import pytest
from live import serving
from tab import Tab, expect, opened, state

import bedplate
from bedplate.runtime.scheduler import Scheduler
from bedplate.serve.keys import Keys
from bedplate.serve.settings import Settings

pytestmark = pytest.mark.slow

HOSTILE = '<img src=x onerror="window.hacked = 1"> & <script>window.hacked = 1</script> it\'s $HOME `id`'


def test_columns_answer_as_the_engine_does(tab: Tab, alone: bedplate.Engine) -> None:
    tab.ask("the fox", most=8)
    tab.ask("a dog")
    for letter, name in {"A": None, "B": "all", "C": "all2"}.items():
        talk: list[Any] = [{"role": "user", "content": "the fox"}]
        first = alone.session(name).generate(talk, max_tokens=8)
        talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "a dog"}]
        second = alone.session(name).generate(talk, max_tokens=8)
        assert tab.texts(letter) == [first, second]
    figures = tab.column("A").locator(".answer .figures").last
    expect(figures).to_contain_text(re.compile(r"first token .* s.*8 tokenscut off at the limit"))
    tab.page.get_by_role("button", name="Start over").click()
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.ask("a dog")
    assert tab.texts("A") == [
        alone.session(None).generate([{"role": "user", "content": "a dog"}], max_tokens=8)
    ]


def test_scale_model_and_settings_of_a_request(tab: Tab, alone: bedplate.Engine) -> None:
    tab.page.get_by_label("Scale of the adapter in column B, as a number").fill("0.5")
    tab.page.get_by_label("Model of column C").select_option(label="all8")
    tab.page.get_by_role("button", name="Remove column A").click()
    tab.page.get_by_role("button", name="Add column").click()
    expect(tab.page.get_by_label("Model of column A")).to_have_value("0")
    tab.set("Temperature", "1.5")
    tab.set("Top p", "0.9")
    tab.set("Seed", "7")
    tab.set("System message", "a cat")
    tab.ask("the fox", most=8)
    talk = [{"role": "system", "content": "a cat"}, {"role": "user", "content": "the fox"}]
    options: Any = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    for letter, adapters in {"A": {}, "B": {"all": 0.5}, "C": {"all8": 1.0}}.items():
        assert tab.texts(letter) == [alone.session(adapters).generate(talk, **options)]


def test_an_error_is_said_in_its_column(tab: Tab) -> None:
    tab.ask("fox " * 500)
    expect(tab.column("B").get_by_role("alert")).to_contain_text("do not fit the context")
    tab.errors[:] = [one for one in tab.errors if "400" not in one]  # the browser tells it too
    tab.ask("the fox", most=4)  # what failed is no part of the conversation
    assert tab.texts("B")[-1]


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Scheduler._step

    def slowly(scheduler: Scheduler) -> None:
        time.sleep(0.05)
        step(scheduler)

    monkeypatch.setattr(Scheduler, "_step", slowly)


def test_stop_and_the_batch_as_it_runs(
    tab: Tab, alone: bedplate.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [{"role": "user", "content": "fox dog"}]  # which all answer at length
    expected = alone.session().generate(talk, max_tokens=256)
    slow_down(monkeypatch)
    prompt = tab.page.get_by_label("Prompt for all columns")
    prompt.fill("fox dog")
    prompt.press("Control+Enter")
    figures = tab.column("A").locator(".figures")
    expect(figures).to_contain_text(re.compile(r"first token .* sabout .* tokens/s"))
    machine = tab.page.locator(".machine")
    expect(machine).to_contain_text("3 answers at once")
    running = state(tab.address)["bases"][0]["running"]
    assert sorted(map(str, (one["adapters"] for one in running))) == ["{'all': 1.0}", "{'all2': 1.0}", "{}"]
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".stopped")).to_have_count(3)
    [text] = tab.texts("A")
    assert text and expected.startswith(text) and text != expected
    expect(figures).to_contain_text("stopped")
    end = time.monotonic() + 5
    while state(tab.address)["bases"][0]["running"]:
        assert time.monotonic() < end, "the server has not noticed"
    prompt.fill("a dog")
    tab.page.get_by_role("button", name="Send").click()
    tab.page.get_by_role("button", name="Stop").click()
    tab.ended()


def test_memory(tab: Tab) -> None:
    tab.ask("the fox", most=4)
    memory = state(tab.address)["bases"][0]["memory"]
    assert memory["foundation"] > 0 and set(memory["adapters"]) >= {"all", "all2"}
    bar = tab.page.get_by_role("img", name=re.compile("foundation .*, all .*, KV cache"))
    expect(bar).to_be_visible()
    expect(tab.page.locator(".machine")).to_contain_text(re.compile(r"models in .* As separate models:"))
    expect(tab.page.locator(".machine canvas")).to_be_visible()
    tab.page.locator(".machine summary").click()
    asked = len(tab.asked)
    tab.page.wait_for_timeout(2500)
    assert len(tab.asked) == asked, "it looks although nobody can see it"


COMPARE = "async (texts) => (await import('./page/diff.js')).compare(...texts)"


WORDS: list[tuple[str, str, list[str], list[str], int, int]] = [
    # left, right, what is marked of each, how many words and how many signs
    ("a b c", "a b c", [], [], 0, 0),
    ("", "", [], [], 0, 0),
    ("", "one two", [], ["one two"], 2, 0),
    ("the red fox runs", "the blue fox runs", ["red"], ["blue"], 2, 0),
    ("one two three", "one three", ["two"], [], 1, 0),
    ("so: it is", "so it is.", [":"], ["."], 0, 2),
    ("größe x y", "größe y x", ["x"], ["x"], 2, 0),
    ("  a\n", "b  ", ["a"], ["b"], 2, 0),
]


def test_words_that_differ(tab: Tab) -> None:
    for left, right, marked, also_marked, words, signs in WORDS:
        found = tab.page.evaluate(COMPARE, [left, right])
        for side, text, expected in (("left", left, marked), ("right", right, also_marked)):
            assert "".join(run["text"] for run in found[side]) == text
            assert [run["text"] for run in found[side] if run["differs"]] == expected
        assert (found["words"], found["signs"]) == (words, signs)


def test_compare(tab: Tab) -> None:
    tab.ask("the fox", most=8)
    before = tab.texts("A"), tab.texts("B")
    tab.compare()
    found = tab.page.evaluate(COMPARE, [before[0][0], before[1][0]])
    assert found["words"] + found["signs"] > 0
    for letter, side in (("A", "left"), ("B", "right")):
        marks = tab.column(letter).locator("mark").all_text_contents()
        assert marks == [run["text"] for run in found[side] if run["differs"]]
    assert (tab.texts("A"), tab.texts("B")) == before
    lines = tab.page.locator("mark").first.evaluate("mark => getComputedStyle(mark).textDecorationLine")
    assert lines == "underline"  # not by colour alone
    expect(tab.page.locator(".compare [role=status]")).to_contain_text("A and B: ")
    tab.page.get_by_label("with column").select_option("C")
    expect(tab.column("C").locator("mark").first).to_be_visible()
    expect(tab.column("B").locator("mark")).to_have_count(0)
    tab.compare()
    expect(tab.page.locator("mark")).to_have_count(0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(tab: Tab) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.ask(HOSTILE, most=8)
    tab.page.get_by_role("button", name="Column B: show the request as curl").click()
    command = tab.page.get_by_label("Command").input_value()
    tab.page.get_by_role("button", name="Copy").click()
    expect(tab.page.get_by_text("Copied.")).to_be_visible()
    assert tab.page.evaluate("navigator.clipboard.readText()") == command
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    for shell in ("bash", "sh"):
        run = subprocess.run([shell, "-c", command], capture_output=True, text=True, check=True)
        pieces = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("data: {")]
        said = [one["choices"][0]["delta"].get("content", "") for one in pieces if one["choices"]]
        assert ["".join(said)] == tab.texts("B")


def test_hostile_text_stays_text(tab: Tab) -> None:
    card = {"id": HOSTILE, "object": "model", "parent": "toy", "root": "", "created": 0, "owned_by": ""}
    base = {**card, "id": "toy", "parent": None}
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [base, card]}))
    piece = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
    tab.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    tab.open()
    tab.ask(HOSTILE)
    tab.compare()
    assert tab.texts("A") == tab.texts("B") == [HOSTILE]
    assert HOSTILE in tab.column("B").locator(".who").text_content()
    assert tab.page.locator(".columns img, .columns script").count() == 0
    assert tab.page.evaluate("window.hacked") is None


def test_a_server_with_keys(browser: Any, toy_bundle: bedplate.Bundle) -> None:
    settings = Settings(keys=Keys.of(["right"]))
    with serving({"toy": toy_bundle}, settings) as address, opened(browser, address) as tab:
        tab.page.goto(address)
        field = tab.page.get_by_label("This server wants an API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(tab.page.get_by_role("alert")).to_contain_text("does not know the key")
        field.fill("right")
        field.press("Enter")
        expect(tab.column("A")).to_be_visible()
        tab.ask("the fox", most=4)
        assert tab.texts("A")[0]
        tab.page.get_by_role("button", name="Column A: show the request").click()
        command = tab.page.get_by_label("Command").input_value()
        assert "right" not in command and "$BEDPLATE_API_KEY" in command
        assert tab.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        tab.page.keyboard.press("Escape")
        tab.page.get_by_role("button", name="Forget key").click()
        expect(field).to_be_visible()
        assert tab.page.evaluate("sessionStorage.length") == 0
        tab.errors[:] = [one for one in tab.errors if "401" not in one]  # the browser tells it too


def test_two_bundles(browser: Any, toy_bundle: bedplate.Bundle, alone: bedplate.Engine) -> None:
    with serving({"one": toy_bundle, "two": toy_bundle}) as address, opened(browser, address) as tab:
        tab.open()
        choice = tab.page.get_by_label("Model of column C")
        choice.select_option(index=6)
        assert choice.locator("option:checked").evaluate("one => one.parentElement.label") == "two"
        tab.ask("the fox", most=8)
        expected = alone.session("all2").generate([{"role": "user", "content": "the fox"}], max_tokens=8)
        assert tab.texts("C") == [expected]
        assert state(address)["bases"][1]["memory"]["adapters"].keys() == {"all2"}
