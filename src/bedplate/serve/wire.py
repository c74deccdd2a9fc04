"""Bodies of requests, as pydantic reads them: what all APIs share.

A field that is unknown, or has a value that is not honoured, is an error of 400 with its name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """Knows its fields, and no others. Text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Said(BaseModel):
    """What the server answers, for its description."""


class Lora(Strict):
    """An adapter that is mixed in. scale: how much of it."""

    id: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class StreamOptions(Strict):
    """include_usage: the last piece tells the tokens."""

    include_usage: bool = False


class Asking(Strict):
    """What every request has that generates.

    model: the base, an adapter, or `base:adapter`.  lora: adapters, in place of the model's own.
    user: fair shares are counted for it.  cache_salt: requests share cached keys and values only if it is the same.
    """

    model: str
    lora: list[Lora] | None = None
    user: str | None = None
    cache_salt: str = ""


class Sampled(Asking):
    """What OpenAI's completions have. `top_k` and what follows have the names that vLLM gives them."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False

    @property
    def tells_usage(self) -> bool:
        """Whether the last piece of a stream tells the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def first_problem(problems: list[Any]) -> tuple[str, str | None]:
    """What pydantic says of a body: a sentence, and the field that it is about."""
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    said = "is no field that this server honours" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{field or 'The body'}: {said}", field
