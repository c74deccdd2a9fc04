"""Functions that a model may call: how a chat template tells it of them, and the grammar of its calls.

A template that knows tools has its own words for them. Else a system message tells the model of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field

from bedplate.runtime.messages import Conversation
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.errors import ApiError
from bedplate.serve.in_words import in_words, with_error
from bedplate.serve.structured import Grammar, quoted, schema_part
from bedplate.serve.template_reads import reads_of
from bedplate.serve.wire import Part, Strict, not_finite

Json = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """parameters: the JSON schema of its arguments. None: it has none.  strict: a keyword of the schema that the
    grammar would ignore is an error.
    """

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that a model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """One of the tools."""

    name: Name


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Part):
    """arguments: the text of a JSON object."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str


class MadeCall(Part):
    """A call of an earlier answer. Other fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class CallPiece(NamedTuple):
    """A piece of a call. position: which call of the answer.  id: of the call.  name: in the first piece of a call,
    else None.  arguments: what is added to the text of its arguments, which is a JSON object.
    """

    position: int
    id: str
    name: str | None
    arguments: str


class Call(NamedTuple):
    """A whole call. arguments: the text of a JSON object."""

    id: str
    name: str
    arguments: str


class Form(NamedTuple):
    """How a model writes calls.

    marker: stands before the first call, and before each if they have an end. Empty: an answer is a call, or is not.
    marker_token, end_token: where a special token is the marker: text does not show it.
    before, end: what stands between the marker and the JSON, and after it.  between: of two calls.
    arguments: what the model calls them.  is_list: whether the calls of an answer are one list.
    many: whether an answer can have several.  short_ids: whether ids have nine letters and digits.
    """

    marker: str
    before: str
    end: str
    between: str = ""
    arguments: str = "arguments"
    is_list: bool = False
    many: bool = True
    short_ids: bool = False
    marker_token: int | None = None
    end_token: int | None = None


OPENING = '{"name": "'  # of all calls


class Calling(NamedTuple):
    """How an answer can call functions. must_call: it is nothing else than calls.  single: it has one at most."""

    form: Form
    functions: Sequence[Function]
    must_call: bool
    single: bool

    def grammar(self, answer: Grammar | None) -> Grammar:
        """Of the whole answer. answer: what it must be where it calls nothing. None: any text."""
        form, several = self.form, self.form.many and not self.single
        rules, parts = ["%llguidance {}"], list[Json]()
        for i, function in enumerate(self.functions):
            begin = f'{OPENING}{function.name}", "{form.arguments}": '
            rules.append(f'f{i}: {quoted(begin)} @part{i + 1} "}}"')
            parts.append(schema_part(_parameters(function), "tools", bool(function.strict)))
        rules.append(f"body: {' | '.join(f'f{i}' for i in range(len(self.functions)))}")
        marker, end = _token(form.marker, form.marker_token), _token(form.end, form.end_token)
        more = f' (", " body)* {quoted("]")}' if several else f" {quoted(']')}"
        body = f"{_text(form.before)} {quoted('[') + ' body' + more if form.is_list else 'body'} {end}"
        rules.append(f"call: {marker} {body}")
        following = f" ({_text(form.between)} call)*" if several and not form.is_list else ""
        if self.must_call:
            rules.append(f"start: call{following}")
        elif answer is not None:
            rules.append(f"start: @part{len(parts) + 1} | call{following}")
            parts += answer.parts
        elif not form.marker:
            rules += [
                "start: TEXT | call",
                rf"TEXT: /(?s:.*)/ & ~/(?s:{OPENING.replace('{', chr(92) + '{')}.*)/",
            ]
        else:
            lazy = form.marker_token is None  # a text ends where the marker does
            first = f"head {body}" if lazy else f"TEXT {marker} {body}"
            rules += [f"start: TEXT | first{following}", f"first: {first}", "TEXT: /(?s:.*)/"]
            rules += [f"head[lazy]: TEXT {marker}"] if lazy else []
        return Grammar([{"lark_grammar": "\n".join(rules)}, *parts], "tools", strict=False)


def calling_of(
    tokenizer: Tokenizer, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool
) -> Calling | None:
    """None: nothing is to be called.

    ApiError: the fields contradict each other, or the model writes calls in a form that is not known here.
    """
    functions = [tool.function for tool in tools]
    names = [function.name for function in functions]
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in names:
        raise ApiError(400, f"There is no tool of the name {named!r}.", param="tool_choice")
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice is required, and there are no tools.", param="tool_choice")
    if len(set(names)) < len(names):
        raise ApiError(400, "Two tools have the same name.", param="tools")
    if not names or choice == "none":
        return None
    return Calling(
        form=_form_of(tokenizer),
        functions=[one for one in functions if named in (None, one.name)],
        must_call=choice == "required" or named is not None,
        single=named is not None or not parallel,
    )


_JSON_IN_MARKERS = Form("<tool_call>", "\n", "\n</tool_call>", between="\n")


def _form_of(tokenizer: Tokenizer) -> Form:
    """As the chat template writes calls. ApiError: in a form that is not known here."""
    source = tokenizer.chat_template or ""
    if not tokenizer.reads_tools:
        return _JSON_IN_MARKERS
    if "[TOOL_CALLS]" in source and "[ARGS]" not in source:  # Mistral
        before = " " if "[TOOL_CALLS] [" in source else ""
        form = Form("[TOOL_CALLS]", before, "", is_list=True, short_ids=True)
    elif "<tool_call>" in source and "<function=" not in source and "<arg_key>" not in source:  # Hermes, Qwen
        form = _JSON_IN_MARKERS
    elif '"parameters": ' in source and "ipython" in source:  # Llama 3
        form = Form("", "", "", arguments="parameters", many=False)
    else:
        message = "The chat template of this model writes calls in a form that this server does not read."
        raise ApiError(400, message, param="tools")
    return form._replace(
        marker_token=tokenizer.special_id(form.marker), end_token=tokenizer.special_id(form.end.strip())
    )


def prompt_of(tokenizer: Tokenizer, messages: Sequence[Json], tools: Sequence[Tool]) -> Conversation:
    """A conversation as the chat template is shown it.

    ApiError: the arguments of an earlier call are no JSON object.
    """
    shown = [{**message, **_with_arguments(message, i)} for i, message in enumerate(messages)]
    if not reads_of(tokenizer.chat_template or "").names("is_error"):
        shown = [with_error(message) for message in shown]
    told = [_told(tool) for tool in tools]
    if tokenizer.reads_tools:
        return Conversation(shown, told)
    return Conversation(in_words(shown, told, tokenizer.chat_template or ""))


def _with_arguments(message: Json, i: int) -> Json:
    """Templates write arguments as JSON, so they are shown them as objects, as in transformers."""
    calls = []
    for n, call in enumerate(message.get("tool_calls") or ()):
        field = f"messages.{i}.tool_calls.{n}.function.arguments"
        value = arguments_in(call["function"]["arguments"], field)
        calls.append({**call, "function": {**call["function"], "arguments": value}})
    return {"tool_calls": calls} if calls else {}


def arguments_in(text: str, param: str) -> Json:
    """ApiError: the text is not one of a JSON object. Python also reads numbers and characters that JSON has no place
    for.
    """
    with suppress(ValueError, RecursionError):
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()
        if isinstance(value, dict) and not_finite(value) is None:
            return value
    raise ApiError(400, f"{param}: this is not the text of a JSON object.", param=param)


def _told(tool: Tool) -> Json:
    """What a template is shown of a tool."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": {**function, "parameters": _parameters(tool.function)}}


def _parameters(function: Function) -> Json:
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if function.parameters.get("type", "object") != "object":
        raise ApiError(400, f"The arguments of {function.name} are no object.", param="tools")
    return {"type": "object", **function.parameters}


def _text(text: str) -> str:
    """As a grammar has it. The empty text is nothing."""
    return quoted(text) if text else ""


def _token(text: str, token: int | None) -> str:
    """A marker: the spaces beside it stay, and the rest is the token, if there is one."""
    if token is None:
        return _text(text)
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{_text(before)} <[{token}]> {_text(after)}"
