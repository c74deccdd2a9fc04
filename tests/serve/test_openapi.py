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
    "unsupported_method",
)
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


@pytest.mark.slow
def test_schemathesis_finds_nothing(address: str, tmp_path: Path) -> None:
    """No answer is a 500, or one that the document does not have."""
    narrowed = tmp_path / "openapi.json"
    narrowed.write_text(json.dumps(_narrowed(get(f"{address}/openapi.json").json)))
    options = (
        f"--url {address} --checks {','.join(CHECKS)} --phases examples,coverage,fuzzing --max-examples 20"
    )
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", narrowed, *options.split(), *_QUIET],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert get(f"{address}/health").status == 200
