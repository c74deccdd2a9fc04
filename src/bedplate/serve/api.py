"""What the server answers, as data: an `Api` is a route, and has what the OpenAPI document says of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bedplate.serve.described import Error
from bedplate.serve.server import body_of

_Body = TypeVar("_Body", bound=BaseModel)
JSON, SSE, TEXT = "application/json", "text/event-stream", "text/plain"


class Api(Route):
    """`get` and `post` make it. `openapi.document` reads it.

    body: of the request.  said: the type of the answer. None: any.  media: what the answer can be.
    errors: statuses that it can have beside 200.  fault: the type of those answers.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Callable[[Request], Awaitable[Response]],
        summary: str,
        *,
        body: type[BaseModel] | None = None,
        said: type[BaseModel] | None = None,
        media: Collection[str] = (JSON,),
        errors: Collection[int] = (),
        fault: type[BaseModel] = Error,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method, self.summary, self.body = method, summary, body
        self.said, self.fault = said, fault
        self.media, self.errors = tuple(media), frozenset(errors)


def get(path: str, answer: Callable[[Request], Awaitable[Response]], summary: str, **described: Any) -> Api:
    """described: see `Api`."""
    return Api("GET", path, answer, summary, **described)


def post(
    path: str,
    body: type[_Body],
    answer: Callable[[Request, _Body], Awaitable[Response]],
    summary: str,
    *,
    errors: Collection[int] = (),
    **described: Any,
) -> Api:
    """A route that reads a body, and is answered by a function of request and body. described: see `Api`."""

    async def endpoint(request: Request) -> Response:
        return await answer(request, await body_of(request, body))

    return Api("POST", path, endpoint, summary, body=body, errors={400, 413, *errors}, **described)


# What every route of models can say, and what every route that generates can say beside it.
UNKNOWN_MODEL = frozenset({404})
GENERATES = frozenset({404, 429, 500, 503})
