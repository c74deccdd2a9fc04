"""The OpenAPI document: what the `Api`s of a server are, in the words of that standard.

`python -m bedplate.serve.openapi FILE` writes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from bedplate.serve.api import JSON, Api, get

Json = dict[str, Any]
# Where the server has keys. Anthropic's clients send the second.
_KEYS: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
Schemas = Mapping[type[BaseModel], Json]
_ERRORS = {
    400: "The request has a field that is not honoured, or a wrong value",
    401: "There is no valid API key",
    403: "Pages of other sites may not use the server, or it is not known by this name",
    404: "There is nothing of this name",
    408: "The body came too slowly",
    413: "The body is too long",
    429: "Too many requests wait",
    500: "The bundle is damaged",
    503: "The server is loading, or ends",
}


def route(others: Sequence[BaseRoute]) -> Api:
    """`/openapi.json`, for these routes and itself."""

    async def answer(request: Request) -> Response:
        return JSONResponse(document([*others, api]))

    api = get("/openapi.json", answer, "This document")
    return api


def document(routes: Iterable[BaseRoute]) -> Json:
    """Of all `Api`s among the routes."""
    apis = [one for one in routes if isinstance(one, Api)]
    types = {one for api in apis for one in (api.body, api.said, api.fault) if one is not None}
    inputs: list[tuple[type[BaseModel], Any, TypeAdapter[Any]]] = [
        (one, "validation", TypeAdapter(one)) for one in sorted(types, key=str)
    ]
    found, parts = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
    schemas = {one: schema for (one, _), schema in found.items()}
    paths: dict[str, Json] = {}
    for api in apis:
        paths.setdefault(api.path_format, {})[api.method.lower()] = _operation(api, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bedplate serve", "version": "1"},
        "paths": dict(sorted(paths.items())),
        "security": [{}, *({name: []} for name in _KEYS)],
        "components": {
            "schemas": parts["$defs"],
            "responses": _faults(apis, schemas),
            "securitySchemes": _KEYS,
        },
    }


def _operation(api: Api, schemas: Schemas) -> Json:
    said = None if api.said is None else schemas[api.said]
    content = {one: _content(one, said) for one in api.media}
    responses: Json = {"200": {"description": "The answer", "content": content}}
    for status in sorted(api.errors):
        responses[str(status)] = {"$ref": f"#/components/responses/{_fault(api, status)}"}
    operation: Json = {"summary": api.summary, "operationId": _name(api), "responses": responses}
    if api.is_open:
        operation["security"] = []
    if api.param_convertors:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in api.param_convertors
        ]
    if api.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schemas[api.body]}}}
    return operation


def _faults(apis: Iterable[Api], schemas: Schemas) -> Json:
    said = {
        _fault(api, status): {
            "description": _ERRORS[status],
            "content": {JSON: {"schema": schemas[api.fault]}},
        }
        for api in apis
        for status in api.errors
    }
    return dict(sorted(said.items()))


def _fault(api: Api, status: int) -> str:
    return f"{api.fault.__name__}{status}"


def _content(media: str, said: Any) -> Json:
    return {"schema": said} if media == JSON and said is not None else {}


def _name(api: Api) -> str:
    parts = api.path_format.replace("{", "").replace("}", "").replace(".", "_").strip("/").split("/")
    return "_".join([api.method.lower(), *parts])


def text(described: Json) -> str:
    """As the file has it."""
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from bedplate.serve.app import create_app

    Path(sys.argv[1]).write_text(text(document(create_app([]).routes)))
