"""What the server says when something goes wrong."""

from __future__ import annotations

import logging
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bedplate.errors import (
    ArgumentError,
    BedplateError,
    ContextFullError,
    MemoryFullError,
    NotFoundError,
    ReplacedError,
    RunError,
    UnsupportedError,
)
from bedplate.runtime.template_guard import BusyError

_log = logging.getLogger("bedplate.serve")
# As Anthropic names the types of errors.
_ANTHROPICS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer with a status from 400 on.

    kind: the type, as OpenAI names them.  param: the field of the request that is wrong.  code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, as OpenAI gives it."""
        said = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": said}

    def in_anthropics_words(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON of the answer, as Anthropic gives it."""
        other = "api_error" if self.status >= 500 else "invalid_request_error"
        message = self.message
        if self.param is not None and self.param.partition(".")[0] not in message:  # there is no place for it
            message = f"{self.param}: {message}"
        said = {"type": _ANTHROPICS.get(self.status, other), "message": message}
        return {"type": "error", "error": said, "request_id": request_id or f"req_{uuid.uuid4().hex}"}

    def body_at(self, path: str) -> dict[str, Any]:
        """The JSON of the answer, as clients of a path expect it."""
        is_anthropics = path == "/v1/messages" or path.startswith("/v1/messages/")
        return self.in_anthropics_words() if is_anthropics else self.body()


def unknown_model(name: str, known: list[str], *, param: str = "model") -> ApiError:
    """404: there is no such model."""
    there = ", ".join(known[:20]) + (" …" if len(known) > 20 else "")
    message = f"The model {name!r} does not exist. There are: {there}"
    return ApiError(404, message, param=param, code="model_not_found")


def of_bedplate(error: BedplateError) -> ApiError:
    """400 for what the caller can change, 503 for what may be otherwise in a moment, 500 for a bundle that is damaged.
    No path is told.
    """
    if isinstance(error, MemoryFullError):
        full = "The server's memory is full: others use all of it. Ask again."
        return ApiError(503, full, kind="server_error", code="memory_full", headers={"Retry-After": "5"})
    if isinstance(error, BusyError):
        busy = "The chat templates of others take all the time. Ask again."
        return ApiError(503, busy, kind="server_error", code="overloaded", headers={"Retry-After": "5"})
    if isinstance(error, ReplacedError):
        now = {"Retry-After": "1"}
        return ApiError(503, f"{error.what}.", kind="server_error", code="adapter_replaced", headers=now)
    if isinstance(error, ContextFullError):
        full = f"{error.what} (hint: shorten the prompt)"
        return ApiError(400, full, param="prompt", code="context_length_exceeded")
    message = error.what if error.hint is None else f"{error.what} (hint: {error.hint})"
    if isinstance(error, NotFoundError):
        return ApiError(404, message, code="not_found")
    if isinstance(error, (RunError, UnsupportedError)):
        name = error.name if isinstance(error, ArgumentError) else None
        return ApiError(400, message, param="prompt" if name == "token_ids" else name)
    return ApiError(500, message, kind="server_error")


def api_error_of(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    return of_bedplate(error) if isinstance(error, BedplateError) else failed(error)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """What is wrong with a field is told by the name that an API has for it.

    names: by the names that chat has; `prompt` is what is read, whatever it is made of.
    """
    try:
        yield
    except (ApiError, BedplateError) as error:
        said = api_error_of(error)
        first, dot, rest = (said.param or "").partition(".")
        name = names.get(first)
        if name is not None:
            said.param = name + dot + rest
            if said.message.startswith(f"{first}{dot or ':'}"):
                said.message = name + said.message.removeprefix(first)
        raise said from error


@contextmanager
def about(param: str) -> Iterator[None]:
    """What the engine refuses in it, and names no field of, is told of this one."""
    try:
        yield
    except (RunError, UnsupportedError) as error:
        said = of_bedplate(error)
        if said.status != 400 or said.param is not None:
            raise
        said.param = (
            "lora" if isinstance(error, UnsupportedError) else param
        )  # adapters that are not to be mixed
        raise said from error


def failed(error: BaseException) -> ApiError:
    """500 for what nobody foresaw. The log says where it happened, and nothing of what was asked: messages of errors
    may repeat it.
    """
    number = uuid.uuid4().hex[:12]
    _log.error("failure %s: %s", number, "\n".join(_places(error)))
    message = f"The server has failed. Its log says where, under {number}."
    return ApiError(500, message, kind="server_error", code=f"failure_{number}")


def _places(error: BaseException) -> Iterator[str]:
    yield type(error).__name__
    for place in traceback.extract_tb(error.__traceback__):
        yield f"  {place.filename}:{place.lineno} in {place.name}: {place.line}"
    for inner in (*getattr(error, "exceptions", ()), error.__cause__ or error.__context__):
        if inner is not None:
            yield "of"
            yield from _places(inner)
