"""Structured output: answers that a grammar allows, by llguidance.

A request's `Guide` makes the mask of each of its answers. A mask follows the tokens of its answer, and says which
tokens may come next. Where the grammar leaves one text only, it forces that text's own tokens: see `ForcingMask`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from llguidance import LLMatcher, LLParserLimits
from pydantic import ConfigDict, Field

from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.catalog import Model
from bedplate.serve.errors import ApiError
from bedplate.serve.vocabulary import vocabulary_of
from bedplate.serve.wire import Sampled, Strict

Json = dict[str, Any]

# As Python's own json writes it. Where whitespace is free, a small model can write it for ever.
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


_STARTING = threading.Lock()
_EXACT = 2**53  # no float is exact beyond it
# llguidance follows the references of a grammar by calls within calls, and would crash where its stack ends.
_LONGEST, _STACK = 1 << 17, 256 << 20  # characters of a grammar; bytes, which are taken only as they are used

_LIMITS = LLParserLimits(verbose_errors=False)  # errors without the text so far

_T = TypeVar("_T")


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


SchemaName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(Strict):
    """strict: a keyword of the schema that the grammar would ignore is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, serialize_by_alias=True)

    name: SchemaName
    description: str | None = None
    wanted: Annotated[Json, Field(alias="schema", default_factory=dict)]
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's field. One of these is given.

    json: a schema, whose keywords are all honoured or refused.  regex: of the whole answer.  choice: the answer is one
    of these texts.  grammar: in Lark's form, as llguidance reads it.
    """

    schema_of_json: Annotated[Json | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class Constrained(Sampled):
    """A request that can say what form its answer has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class Grammar(NamedTuple):
    """parts: grammars as llguidance reads them; the first is the whole, and can name the others.

    param: the field of the request that it is of.  strict: what llguidance warns of is an error.
    """

    parts: Sequence[Json]
    param: str
    strict: bool = True


def grammar_of(request: Constrained) -> Grammar | None:
    """What the answer must be. None: any text."""
    form, outputs = request.response_format, request.structured_outputs
    if outputs is not None:
        if form is not None:
            message = "Give response_format or structured_outputs, and not both."
            raise ApiError(400, message, param="structured_outputs")
        return _of_outputs(outputs)
    if isinstance(form, JsonFormat):
        return Grammar([schema_part({"type": "object"}, "response_format")], "response_format")
    if isinstance(form, SchemaFormat):
        strict = bool(form.json_schema.strict)
        return Grammar(
            [schema_part(form.json_schema.wanted, "response_format", strict)], "response_format", strict
        )
    return None


def _of_outputs(outputs: StructuredOutputs) -> Grammar:
    param = "structured_outputs"
    given = outputs.model_dump(exclude_none=True, by_alias=True)
    if len(given) != 1:
        raise ApiError(400, "Give one of json, regex, choice and grammar.", param=param)
    ((kind, value),) = given.items()
    if kind == "json":
        part = schema_part(value, f"{param}.json")
    elif kind == "regex":
        (part,) = json.loads(LLMatcher.grammar_from_regex(value))["grammars"]
    else:
        part = {"lark_grammar": value if kind == "grammar" else f"start: {' | '.join(map(quoted, value))}"}
    return Grammar([part], f"{param}.{kind}")


def schema_part(schema: Json, param: str, strict: bool = True) -> Json:
    """The grammar of JSON. param: the field that the schema is of.  strict: what the grammar cannot hold is an error,
    and not ignored.

    ApiError: the schema has options of llguidance.
    """
    if "x-guidance" in schema:
        message = f"{param}: x-guidance is no keyword of a schema that this server honours."
        raise ApiError(400, message, param=param)
    coerced = {} if strict else {"coerce_one_of": True}  # as anyOf
    return {"json_schema": {**schema, "x-guidance": {**_WRITTEN, "lenient": not strict, **coerced}}}


def quoted(text: str) -> str:
    """A text, as a grammar in Lark's form has it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def guide_of(model: Model, request: Constrained, grammar: Grammar | None = None) -> Guide | None:
    """Of a grammar, or of the form that the request gives its answer. None: it may be any text.

    ApiError: the request has a field that a grammar leaves no room for.
    """
    grammar = grammar or grammar_of(request)
    if grammar is None:
        return None
    for field, value in (("ignore_eos", request.ignore_eos), ("min_tokens", request.min_tokens)):
        if value:
            message = f"{field} cannot be used with {grammar.param}: the grammar ends the text."
            raise ApiError(400, message, param=field)
    return Guide(model.tokenizer, grammar)


class Guide:
    """Makes the masks of a request's answers. It is called in a thread: the first call can take a second.

    ApiError: the grammar is wrong.
    """

    def __init__(self, tokenizer: Tokenizer, grammar: Grammar) -> None:
        self._tokenizer, self._grammar = tokenizer, grammar
        self._lock = threading.Lock()
        self._first: LLMatcher | None = None

    def __call__(self) -> GrammarMask:
        with self._lock:
            if self._first is None:
                self._first = self._made()
            return GrammarMask(self._first.deep_copy(), self._grammar.param)

    def _made(self) -> LLMatcher:
        grammar, vocabulary = self._grammar, vocabulary_of(self._tokenizer, self._grammar.param)
        parts = [{"name": f"part{i}", **one} for i, one in enumerate(grammar.parts)]
        source = json.dumps({"grammars": parts}, ensure_ascii=False)
        if len(source) > _LONGEST:
            message = f"The grammar is refused: it has more than {_LONGEST} characters."
            raise ApiError(400, message, param=grammar.param)
        if large := next(_inexact(parts), None):
            message = f"The grammar is refused: {large} is too large to be exact."
            raise ApiError(400, message, param=grammar.param)
        wrong, said = _with_deep_stack(lambda: LLMatcher.validate_grammar_with_warnings(source, vocabulary))
        if wrong or (grammar.strict and said):
            raise ApiError(400, f"The grammar is refused: {'; '.join(said)}", param=grammar.param)
        return _with_deep_stack(lambda: LLMatcher(vocabulary, source, log_level=0, limits=_LIMITS))


class GrammarMask:
    """The tokens that a grammar allows after those so far. An end token is allowed where the grammar can end.

    param: the field of the request that the grammar is of.
    """

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher, self._param = matcher, param
        self._read = 0  # tokens that the matcher knows
        self._forced: list[int] = matcher.compute_ff_tokens()

    def __call__(self, chosen: tuple[int, ...]) -> bytes:
        self._follow(chosen)
        if self._forced:  # in the tokenizer's own way: other tokens that spell the same would take more steps
            return _bit(self._forced[0])
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def forced(self, chosen: tuple[int, ...], most: int) -> list[int]:
        self._follow(chosen)
        return self._forced[:most]

    def _follow(self, chosen: tuple[int, ...]) -> None:
        for token in chosen[self._read :]:
            self._matcher.consume_token(token)
            self._check()
            was_forced = self._forced[:1] == [token]
            self._forced = self._forced[1:] if was_forced else []
            if not self._forced:
                self._forced = self._matcher.compute_ff_tokens()
        self._read = len(chosen)

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().partition("\n")[0]
            message = f"The grammar cannot be followed: {said} (hint: use a simpler schema or grammar)"
            raise ApiError(400, message, param=self._param)


def _inexact(value: Any) -> Iterator[int]:
    """Numbers that llguidance, which reads all as floats, would change."""
    if isinstance(value, int) and abs(value) > _EXACT:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _inexact(inner)


def _with_deep_stack(function: Callable[[], _T]) -> _T:
    """What a function returns that needs no Python, in a thread of its own."""
    found: list[_T] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    with _STARTING:
        before = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    return found[0]


def _bit(token: int) -> bytes:
    return (1 << token).to_bytes(4 * (token // 32 + 1), "little")
