"""Bodies of requests, as pydantic reads them: what all APIs share.

A field that is unknown, or has a value that is not honoured, is an error of 400 with its name.
"""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

Stop = Annotated[str, Field(max_length=1000)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
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


class Part(BaseModel):
    """Of a body. One error is told, so few are made: it can have millions of wrong items."""

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
    def _with_few_unknown(cls, fields: Any) -> Any:
        """Of too many fields, one that is unknown is left, so that not each makes an error."""
        most = len(cls.model_fields) + 1
        few = isinstance(fields, dict) and len(fields) > most
        return dict(islice(fields.items(), most)) if few else fields


class Lora(Strict):
    """An adapter that is mixed in. scale: how much of it."""

    id: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


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

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """Null is what is not given: clients send it for what they leave alone."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


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


class Sampled(Sampling):
    """What OpenAI's completions of text and chat have."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None

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


def first_problem(problems: list[Any]) -> tuple[str, str | None]:
    """What pydantic says of a body: a sentence, and the field that it is about."""
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    said = "is no field that this server honours" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{field or 'The body'}: {said}", field
