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
# What `Guard` can say: of the site that a page is from, of keys and while the server ends, of a body.
_SITE, _GUARDED, OF_BODY = frozenset({403}), frozenset({401, 503}), frozenset({400, 408, 413})
JSON, SSE, TEXT = "application/json", "text/event-stream", "text/plain"


class Api(Route):
    """`get` and `post` make it. `openapi.document` reads it.

    body: of the request.  said: the type of the answer. None: any.  media: what the answer can be.
    errors: statuses that it can have beside 200, and beside those of `Guard`.  fault: the type of those answers.
    is_open: it needs no key.
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
        is_open: bool = False,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.method, self.summary, self.body = method, summary, body
        self.said, self.fault, self.is_open = said, fault, is_open
        self.media = tuple(media)
        self.errors = frozenset({*errors, *_SITE, *(() if is_open else _GUARDED)})


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

    return Api("POST", path, endpoint, summary, body=body, errors={*OF_BODY, *errors}, **described)


# What every route of models can say, and what every route that generates can say beside it.
UNKNOWN_MODEL = frozenset({404})
GENERATES = frozenset({404, 429, 500})
