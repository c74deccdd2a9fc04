"""Bodies of requests, as pydantic reads them: what all APIs share.

A field that is unknown, or has a value that is not honoured, is an error of 400 with its name.
"""

from __future__ import annotations

import math
import re
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, from_json

from bedplate.serve.errors import ApiError

_Body = TypeVar("_Body", bound=BaseModel)
_Path = tuple[str | int, ...]
Stop = Annotated[str, Field(max_length=1000)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_LARGEST = 2.0**128 - 2.0**104  # of 32 bits
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _at_most(most: int) -> BeforeValidator:
    """Of an object with any names: how many. It is checked before each of them can make an error."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_long", "It has more than {most} names", {"most": most})
        return value

    return BeforeValidator(check)


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        _fail_fast(list(schema.values()))
    elif isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


def _given(fields: Any) -> Any:
    """Without nulls: clients send them for what they leave alone."""
    if not isinstance(fields, dict):
        return fields
    return {name: value for name, value in fields.items() if value is not None}


class Part(BaseModel):
    """Of a body. One error is told, so few are made: it can have millions of wrong items."""

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, fields: Any) -> Any:
        return _given(fields)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A list is read up to its first wrong item."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Strict(Part):
    """Knows its fields, and no others. Text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, fields: Any) -> Any:
        """In place of that of all parts: of too many fields, one that is unknown is left, so that not each makes an
        error.
        """
        most, given = len(cls.model_fields) + 1, _given(fields)
        few = isinstance(given, dict) and len(given) > most
        return dict(islice(given.items(), most)) if few else given


class Lora(Strict):
    """An adapter that is mixed in. scale: how much of it, a number of 32 bits."""

    id: str
    scale: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)] = 1.0


class StreamOptions(Strict):
    """include_usage: the last piece tells the tokens.  include_obfuscation: there is none."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asking(Strict):
    """What every request has that generates.

    model: the base, an adapter, or `base:adapter`.  lora: adapters, in place of the model's own.
    user: fair shares are counted for it, among the requests of one API key.
    timeout: seconds after which its answers end, if the server has no shorter limit.
    cache_salt: requests share cached keys and values only if it is the same.
    """

    model: str
    lora: Annotated[list[Lora], Field(max_length=64)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    cache_salt: str = ""

    @property
    def caller(self) -> str | None:
        """Whose request it is, among those of one API key."""
        return self.user


class Sampling(Asking):
    """How tokens are chosen. `top_k` and what follows have the names that vLLM gives them."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stream: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=16384), _at_most(16384)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False

    @property
    def answers(self) -> int:
        """How many are wanted."""
        return 1

    def check(self) -> None:
        """ApiError: a field needs another one, or contradicts it."""
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ApiError(400, "stream_options: it needs stream.", param="stream_options")


class Sampled(Sampling):
    """What OpenAI's completions of text and chat have."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def answers(self) -> int:
        return self.n

    @property
    def tells_usage(self) -> bool:
        """Whether the last piece of a stream tells the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Accepted(Asking):
    """Fields that OpenAI's clients send, and that change nothing here. A value that would change something is refused.

    metadata: it is for what is stored.  store: nothing is.  service_tier: there is one.  prompt_cache_key and
    prompt_cache_retention: the cache goes by content, and is in memory.  safety_identifier: a `user`.
    """

    metadata: Annotated[dict[str, str], Field(max_length=16), _at_most(16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: str | None = None

    @property
    def caller(self) -> str | None:
        """Whose request it is, among those with the same key."""
        return self.user if self.user is not None else self.safety_identifier


def read_json(kind: type[_Body], body: bytes) -> _Body:
    """ApiError: it is no JSON, or has a field that is not honoured."""
    try:
        read = kind.model_validate_json(body)
    except ValidationError as error:
        is_json = error.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid"
        raise first_problem(error, from_json(body) if is_json else None) from None
    # Schemas and arguments are any JSON, and are told again: what is no number there has no place in JSON.
    if _MAY_BE_INFINITE.search(body) and (path := not_finite(from_json(body))) is not None:
        field = ".".join(map(str, path))
        raise ApiError(400, f"{field}: a number must be finite.", param=field)
    return read


# Of each number whose value is beyond a float's range, this is a part.
_MAY_BE_INFINITE = re.compile(rb"NaN|Infinity|\d[eE]\+?\d\d|\d{200}")


def not_finite(value: Any) -> _Path | None:
    """Where in it a number is infinite, or none at all. None: nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ()
    if not isinstance(value, (dict, list)):
        return None
    for at, part in value.items() if isinstance(value, dict) else enumerate(value):
        if (path := not_finite(part)) is not None:
            return (at, *path)
    return None


def first_problem(error: ValidationError, sent: Any) -> ApiError:
    """What pydantic says of what was sent: a sentence, and the field that it is about.

    Of a field that can be of several kinds, the kind counts that was read furthest.
    """
    found = [(one, _as_sent(sent, one)) for one in error.errors(include_url=False, include_input=False)]
    first = found[0][1]
    problem, path = max((one for one in found if one[1][: len(first)] == first), key=_read_so_far)
    field = ".".join(map(str, path)) or None
    forbidden = problem["type"] == "extra_forbidden"
    said = "is no field that this server honours" if forbidden else problem["msg"]
    return ApiError(400, f"{field or 'The body'}: {said}", param=field)


def _read_so_far(found: tuple[ErrorDetails, _Path]) -> tuple[int, bool]:
    problem, path = found
    return len(path), not problem["type"].endswith("_type")


def _as_sent(sent: Any, problem: ErrorDetails) -> _Path:
    """Where in what was sent it is. pydantic also names the kinds that it tried."""
    path, missing = problem["loc"], tuple[str | int, ...]()
    if problem["type"] == "missing":
        path, missing = path[:-1], path[-1:]
    while path and not (found := _leading(sent, path)):
        path = path[:-1]
    return (*(found if path else ()), *missing)


def _leading(sent: Any, path: _Path) -> _Path:
    """The parts of a path that lead to its last part. Empty: none do."""
    name, rest = path[0], path[1:]
    is_there = name in sent if isinstance(sent, dict) else isinstance(sent, list) and isinstance(name, int)
    if is_there:
        inner = _leading(sent[name], rest) if rest else ()
        if inner or not rest:
            return (name, *inner)
    return _leading(sent, rest) if rest else ()
