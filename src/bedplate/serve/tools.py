"""Functions that a model may call: what a request tells of them, and the calls in an answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from bedplate.serve.wire import Strict

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """parameters: the JSON schema of its arguments. None: it has none.  strict: a keyword of the schema that the
    grammar would ignore is an error.
    """

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
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
