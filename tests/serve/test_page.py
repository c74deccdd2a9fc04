"""The page at `/`, in a browser, and the files that it consists of."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from live import serving

import bedplate
from bedplate.runtime.scheduler import Scheduler
from bedplate.serve.page import FILES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
HOSTILE = "<img src=x onerror=\"window.hacked = 1\"> & <script>window.hacked = 1</script> it's $HOME `id`"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab with the page, and what it did."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.address, self.asked = address, list[str]()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self) -> None:
        self.page.goto(self.address)
        expect(self.page.get_by_role("region", name="Column A")).to_be_visible()

    def column(self, letter: str) -> Any:
        return self.page.get_by_role("region", name=f"Column {letter}", exact=True)

    def ask(self, prompt: str, most: int | None = None) -> None:
        """Ask all columns, and wait for their answers."""
        if most is not None:
            self.set("Most tokens", str(most))
        field = self.page.get_by_label("Prompt for all columns")
        field.fill(prompt)
        field.press("Enter")
        self.ended()

    def ended(self) -> None:
        expect(self.page.locator(".answer").first).to_be_visible()
        expect(self.page.locator(".running")).to_have_count(0, timeout=20_000)

    def set(self, label: str, value: str) -> None:
        field = self.page.get_by_label(label)
        if not field.is_visible():
            self.page.locator(".settings summary").click()
        field.fill(value)

    def texts(self, letter: str) -> list[str]:
        return [one.text_content() for one in self.column(letter).locator(".text").all()]

    def compare(self) -> None:
        self.page.get_by_role("button", name="Compare", exact=True).click()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    """Of the toy server. It must have asked nobody else, and nothing may have gone wrong."""
    tab = Tab(browser, address)
    tab.open()
    yield tab
    origins = {f"{url.scheme}://{url.netloc}" for url in map(urlsplit, tab.asked)}
    tab.context.close()
    assert tab.errors == [] and origins == {address}


@needs_browser
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
    expect(figures).to_contain_text(re.compile(r"first token after .* s · .* tokens/s · 8 tokens"))
    tab.page.get_by_role("button", name="Start over").click()
    expect(tab.page.locator(".turn")).to_have_count(0)
    tab.ask("a dog")
    assert tab.texts("A") == [alone.session(None).generate([{"role": "user", "content": "a dog"}], max_tokens=8)]


@needs_browser
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


@needs_browser
def test_an_error_is_said_in_its_column(tab: Tab) -> None:
    tab.ask("fox " * 500)
    expect(tab.column("B").get_by_role("alert")).to_contain_text("do not fit the context")
    tab.errors[:] = [one for one in tab.errors if "400" not in one]  # the browser tells it too
    tab.ask("the fox", most=4)  # what failed is no part of the conversation
    assert tab.texts("B")[-1]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Scheduler._step

    def slowly(scheduler: Scheduler) -> None:
        time.sleep(0.03)
        step(scheduler)

    monkeypatch.setattr(Scheduler, "_step", slowly)


def state(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/v1/bedplate/state") as said:
        return json.load(said)


@needs_browser
def test_stop_and_the_batch_as_it_runs(tab: Tab, alone: bedplate.Engine, slow: None) -> None:
    prompt = tab.page.get_by_label("Prompt for all columns")
    prompt.fill("the fox")
    prompt.press("Control+Enter")
    expect(tab.column("A").locator(".text")).not_to_be_empty()
    machine = tab.page.locator(".machine")
    expect(machine).to_contain_text("3 answers at once")
    running = state(tab.address)["bases"][0]["running"]
    assert sorted(map(str, (one["adapters"] for one in running))) == ["{'all': 1.0}", "{'all2': 1.0}", "{}"]
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".stopped")).to_have_count(3)
    expected = alone.session().generate([{"role": "user", "content": "the fox"}], max_tokens=200)
    [text] = tab.texts("A")
    assert text and expected.startswith(text) and text != expected
    end = time.monotonic() + 5
    while state(tab.address)["bases"][0]["running"]:
        assert time.monotonic() < end, "the server has not noticed"
    prompt.fill("a dog")
    tab.page.get_by_role("button", name="Send").click()
    tab.page.get_by_role("button", name="Stop").click()
    tab.ended()


@needs_browser
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


@needs_browser
@pytest.mark.parametrize(
    ("left", "right", "marked", "words", "signs"),
    [
        ("a b c", "a b c", ([], []), 0, 0),
        ("", "", ([], []), 0, 0),
        ("", "one two", ([], ["one two"]), 2, 0),
        ("the red fox runs", "the blue fox runs", (["red"], ["blue"]), 2, 0),
        ("one two three", "one three", (["two"], []), 1, 0),
        ("so: it is", "so it is.", ([":"], ["."]), 0, 2),
        ("größe x y", "größe y x", (["x"], ["x"]), 2, 0),
        ("  a\n", "b  ", (["a"], ["b"]), 2, 0),
    ],
)
def test_words_that_differ(
    tab: Tab, left: str, right: str, marked: tuple[list[str], list[str]], words: int, signs: int
) -> None:
    found = tab.page.evaluate(COMPARE, [left, right])
    for side, text, expected in zip(("left", "right"), (left, right), marked, strict=True):
        assert "".join(run["text"] for run in found[side]) == text
        assert [run["text"] for run in found[side] if run["differs"]] == expected
    assert (found["words"], found["signs"]) == (words, signs)


@needs_browser
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


@needs_browser
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


@needs_browser
def test_keyboard_alone(tab: Tab) -> None:
    keys = tab.page.keyboard

    def focus() -> str:
        """What has it. It can be seen."""
        name, outline = tab.page.evaluate(
            "() => { const one = document.activeElement, style = getComputedStyle(one);"
            " return [one.getAttribute('aria-label') || one.id || one.textContent.trim(), style.outlineStyle]; }"
        )
        assert outline == "solid", name
        return str(name)

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            if name in focus():
                return
            keys.press(key)
        raise AssertionError(f"no {name}")

    assert focus() == "prompt"
    tab_to("Model of column B", "Shift+Tab")
    keys.press("ArrowDown")
    expect(tab.page.get_by_label("Model of column B")).to_have_value("2")
    tab_to("Scale of the adapter in column B")
    keys.press("ArrowLeft")
    expect(tab.page.get_by_label("Scale of the adapter in column B, as a number")).to_have_value("0.95")
    tab_to("prompt")
    keys.type("the")
    keys.press("Shift+Enter")
    keys.type("fox")
    tab_to("Settings")
    keys.press("Enter")
    keys.press("Tab")
    keys.type("a cat")
    tab_to("prompt", "Shift+Tab")
    keys.press("Enter")
    tab.ended()
    expect(tab.column("A").locator(".prompt")).to_have_text("You: the\nfox")
    tab_to("Column B: show the request", "Shift+Tab")
    keys.press("Enter")
    request = tab.page.get_by_label("Command").input_value()
    assert '"lora":[{"id":"all2","scale":0.95}]' in request and "a cat" in request
    keys.press("Escape")
    assert "Column B: show the request" in focus()


CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const [r, g, b] = style.getPropertyValue(name).match(/\\w\\w/g).map((part) => parseInt(part, 16) / 255)
      .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = ["text", "muted", "accent", "problem", ...[0, 1, 2, 3, 4, 5, 6].map((hue) => `hue-${hue}`)];
  return {
    ...Object.fromEntries(texts.map((name) => [name, contrast(`--${name}`, "--surface")])),
    raised: contrast("--text", "--raised"), ground: contrast("--muted", "--ground"),
    mark: contrast("--text", "--mark"), main: contrast("--on-accent", "--accent"),
  };
}"""


@needs_browser
def test_light_and_dark(browser: Any, address: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        tab = Tab(browser, address, color_scheme=scheme)
        tab.open()
        assert {name: value for name, value in tab.page.evaluate(CONTRASTS).items() if value < 4.5} == {}
        grounds.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.context.close()
        assert tab.errors == []
    light, dark = (sum(map(int, re.findall(r"\d+", ground))) for ground in grounds)
    assert light > 600 and dark < 100


@needs_browser
def test_a_phone(browser: Any, address: str) -> None:
    tab = Tab(browser, address, viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True)
    tab.open()
    tab.ask("x" * 60, most=8)
    tab.compare()
    for _ in range(2):
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 375
        for button in tab.page.get_by_role("button").all():
            box = button.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["height"] >= 24
        tab.page.get_by_role("button", name="Column A: show the request").click()
    tab.context.close()
    assert tab.errors == []


@needs_browser
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


@needs_browser
def test_a_server_with_keys(browser: Any, address: str) -> None:
    tab = Tab(browser, address)
    said = {"error": {"message": "Give a key.", "type": "authentication_error", "param": None, "code": None}}

    def check(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json=said)

    tab.page.route("**/v1/**", check)
    tab.page.goto(address)
    field = tab.page.get_by_label("This server wants an API key")
    for key, answer in (("wrong", "does not know the key"), ("right", "")):
        field.fill(key)
        field.press("Enter")
        if answer:
            expect(tab.page.get_by_role("alert")).to_contain_text(answer)
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
    tab.context.close()
    assert [one for one in tab.errors if "401" not in one] == []


@needs_browser
def test_two_bundles(browser: Any, toy_bundle: bedplate.Bundle, alone: bedplate.Engine) -> None:
    with serving({"one": toy_bundle, "two": toy_bundle}) as address:
        tab = Tab(browser, address)
        tab.open()
        choice = tab.page.get_by_label("Model of column C")
        choice.select_option(index=6)
        assert choice.locator("option:checked").evaluate("one => one.parentElement.label") == "two"
        tab.ask("the fox", most=8)
        expected = alone.session("all2").generate([{"role": "user", "content": "the fox"}], max_tokens=8)
        assert tab.texts("C") == [expected]
        assert state(address)["bases"][1]["memory"]["adapters"].keys() == {"all2"}
        tab.context.close()
        assert tab.errors == []


def test_vendored_files_are_as_their_packages_have_them() -> None:
    folder = FILES / "vendor"
    packages = json.loads((folder / "versions.json").read_text("utf-8"))
    listed = {name: one["sha256"] for package in packages for name, one in package["files"].items()}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["versions.json"]
    assert found == listed
    assert all({"package", "version", "licence", "source", "sha512"} <= set(package) for package in packages)


def test_no_file_asks_elsewhere_or_makes_html_of_text() -> None:
    for path in FILES.iterdir():
        if path.is_file():
            text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "://" not in text and "HTML =" not in text and "dangerously" not in text, path


def fetch(url: str, **headers: str) -> tuple[int, Any, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as said:
            return said.status, said.headers, said.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_files_are_sent_with_a_strict_policy(address: str) -> None:
    for path in ["/", "/page/app.js", "/page/style.css", "/page/icon.svg", "/page/vendor/uplot.js"]:
        status, headers, body = fetch(address + path)
        policy = headers["Content-Security-Policy"]
        assert status == 200 and body and policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert fetch(address + path, **{"If-None-Match": headers["ETag"]})[0] == 304


@pytest.mark.parametrize("path", ["none.js", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "vendor", "", "/etc/passwd"])
def test_there_are_no_other_files(address: str, path: str) -> None:
    status, _, body = fetch(f"{address}/page/{path}")
    assert status == 404 and "no such file" in json.loads(body)["error"]["message"]
