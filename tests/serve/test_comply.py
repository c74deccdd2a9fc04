"""llm-comply: answers and streams by OpenAI's, Anthropic's and Open Responses' own schemas."""

from __future__ import annotations

from pathlib import Path

import llm_comply
import pytest
from llm_comply import config, runner, schema
from llm_comply.tests import get_tests

# They send a picture. bedplate runs models of text, and says so with a 400.
PICTURES = {"chat-image-input", "image-input", "anth-image-input"}
FORMATS = {
    "openai-chat": "openai_chat.json",
    "open-responses": "openresponses.json",
    "anthropic": "anthropic.json",
}


def run(address: str, name: str) -> dict[str, runner.TestResult]:
    specs = Path(llm_comply.__file__).parent / "specs"
    settings = config.ComplianceConfig(base_url=f"{address}/v1", api_key="none", model="scripted")
    spec = schema.SpecLoader(str(specs / FORMATS[name]))
    return {one.id: one for one in runner.TestRunner(settings, get_tests(name), spec).run_all().results}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_answers_comply(name: str, scripted_address: str) -> None:
    found = run(scripted_address, name)
    wrong = {id: one.errors for id, one in found.items() if one.status == runner.TestStatus.FAILED}
    assert set(wrong) == PICTURES & set(found), wrong
    assert all("HTTP 400" in errors[0] for errors in wrong.values()), wrong
    skipped = {id for id, one in found.items() if one.status == runner.TestStatus.SKIPPED}
    # Whether a model reasons is taken from its name.
    assert skipped <= {"chat-reasoning-summary", "reasoning-summary", "anth-thinking-display"}
    warned = {id: one.warnings for id, one in found.items() if one.warnings and id not in wrong}
    # There is no `/v1/responses/compact`: it needs a model that can make a conversation short.
    assert set(warned) <= {"compact-response"}, warned
