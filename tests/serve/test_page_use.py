"""The page by keyboard, in light and dark, and on a phone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tab import Tab, expect, opened

pytestmark = pytest.mark.slow


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
    expect(tab.page.get_by_label("Command")).to_be_focused()  # the dialog is open
    request = tab.page.get_by_label("Command").input_value()
    assert '"lora":[{"id":"all2","scale":0.95}]' in request and "a cat" in request
    keys.press("Escape")
    expect(tab.page.get_by_label("Column B: show the request")).to_be_focused()


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


def test_light_and_dark(browser: Any, address: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(browser, address, color_scheme=scheme) as tab:
            tab.open()
            assert {name: value for name, value in tab.page.evaluate(CONTRASTS).items() if value < 4.5} == {}
            grounds.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", ground))) for ground in grounds)
    assert light > 600 and dark < 100


def test_a_phone(browser: Any, address: str) -> None:
    with opened(
        browser, address, viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True
    ) as tab:
        tab.open()

        def fits() -> None:
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= 375
            for control in tab.page.locator("button, select, input, textarea, dialog").all():
                if (box := control.bounding_box()) is not None:
                    assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["height"] >= 24

        fits()
        tab.ask("x" * 60, most=8)  # which opens the settings
        tab.compare()
        fits()
        tab.page.get_by_role("button", name="Column A: show the request").click()
        fits()
