"""The OpenAPI document, and the server as schemathesis tries it by that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scraped import get
from starlette.routing import Route

from bedplate.serve import openapi
from bedplate.serve.api import Api
from bedplate.serve.app import create_app

COMMITTED = Path(__file__).parents[2] / "docs" / "openapi.json"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
# Others cannot hold. `positive_data_acceptance`: no schema says which models there are, which fields contradict each
# other, and what fits the context. `ignored_auth`: this server has no keys; test_guard has. `use_after_free`,
# `ensure_resource_availability`, `missing_required_header`, `object_level_authorization`: there is none of this here.
_QUIET = (
    "--generation-deterministic",
    "--continue-on-failure",
    "--no-shrink",
    "--no-color",
    "--warnings",
    "off",
)


def test_the_committed_document_is_current() -> None:
    said = openapi.text(openapi.document(create_app([]).routes))
    assert COMMITTED.read_text() == said, "make openapi"


def test_every_path_but_those_of_the_page_is_described(address: str) -> None:
    others = [
        one.path for one in create_app([]).routes if isinstance(one, Route) and not isinstance(one, Api)
    ]
    assert set(others) == {"/", "/page/{name:path}"}
    assert get(f"{address}/openapi.json").json == json.loads(COMMITTED.read_text())


def _narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """So that many requests come to an answer, and to a short one."""
    narrower: dict[str, Any] = {
        "max_tokens": {"const": 3},
        "max_completion_tokens": {"const": 3},
        "max_output_tokens": {"const": 3},
        "min_tokens": {"enum": [0, 1]},
        "n": {"enum": [1, 2]},
        "best_of": {"const": 1},
        "logit_bias": {"const": {"5": -1.5}},
    }
    for name, schema in document["components"]["schemas"].items():
        fields = schema.get("properties", {})
        if name.endswith("Request") or name == "Conversation":
            fields.update({field: kind for field, kind in narrower.items() if field in fields})
            fields["model"] = {"enum": ["toy", "all", "toy:all2"]}
        if name == "ChatMessage":
            fields["role"] = {"enum": ["system", "user", "assistant"]}
            fields["content"] = {"type": "string"}
            schema["required"] = ["role", "content"]
        if name == "CompletionRequest":
            text, tokens = {"type": "string", "minLength": 1}, {"enum": [[5], [5, 6, 7]]}
            texts = {"type": "array", "items": text, "minItems": 1, "maxItems": 3}
            fields["prompt"] = {"anyOf": [text, texts, tokens]}
        if name == "ChatCompletionRequest":
            fields["logprobs"] = {"const": True}
        if name == "Lora":
            fields["id"] = {"enum": ["all", "all2", "none"]}
    return document


def _without_large_bounds(part: Any) -> Any:
    """A body beyond such a bound has megabytes. test_limits and test_fields send a few."""
    if isinstance(part, dict):
        return {
            name: _without_large_bounds(value)
            for name, value in part.items()
            if not (name.startswith("max") and isinstance(value, int) and value > 100)
        }
    return [_without_large_bounds(one) for one in part] if isinstance(part, list) else part


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepared", "checks", "phases"),
    [
        (_without_large_bounds, (*CHECKS, "negative_data_rejection"), "coverage"),
        # What is narrowed says less than is accepted.
        (_narrowed, CHECKS, "examples,fuzzing"),
    ],
)
def test_schemathesis_finds_nothing(
    prepared: Any, checks: tuple[str, ...], phases: str, address: str, tmp_path: Path
) -> None:
    """No answer is a 500, or one that the document does not have. What it does not allow is refused."""
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(prepared(get(f"{address}/openapi.json").json)))
    options = f"--url {address} --checks {','.join(checks)} --phases {phases} --max-examples 20"
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", document, *options.split(), *_QUIET],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert get(f"{address}/health").status == 200
