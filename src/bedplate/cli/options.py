"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from bedplate.cli.reading import check_texts
from bedplate.errors import RunError

_T = TypeVar("_T")

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")]
KvPrecision = Annotated[
    Literal["float16", "float32"],
    typer.Option(help="How to keep keys and values: float32 takes twice the memory."),
]
Threads = Annotated[
    int | None, typer.Option(help="How many threads to use. Without this option: one for each physical core.")
]
NoCheck = Annotated[
    bool,
    typer.Option(
        "--no-check",
        help="Do not hash the files of the bundle. It starts sooner. Use it if you verified the bundle once.",
    ),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="NAME", help="Adapter to use. Without this option: the base.")
]
Scale = Annotated[float, typer.Option(help="How much of the adapter counts. 1: the adapter as it is.")]
MaxContext = Annotated[
    int | None,
    typer.Option(
        help="How many positions a session can hold. Without this option: as many as the model has."
    ),
]
System = Annotated[str | None, typer.Option(help="The system message.")]


def _generation(
    max_tokens: Annotated[int, typer.Option(help="End after this many tokens.")],
    temperature: Annotated[
        float, typer.Option(help="How random the choice of tokens is. 0: always the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Choose only among the most likely tokens that have this probability together."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Choose only among this many of the most likely tokens. 0: all.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Choose only among tokens that have at least this part of the probability of the likeliest. 0: all."
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(help="Above 1: make tokens of the prompt and of the answer less likely. 1.1 is usual."),
    ] = 1.0,
    presence_penalty: Annotated[
        float,
        typer.Option(help="Above 0: make tokens that the answer has already less likely. From -2 to 2."),
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="Above 0: make tokens less likely each time that the answer has them. From -2 to 2."
        ),
    ] = 0.0,
    logit_bias: Annotated[
        str | None,
        typer.Option(
            metavar="ID=NUMBER,...",
            help="Make tokens more likely (up to 100) or less likely (down to -100): 15=2.5,16=-1.",
        ),
    ] = None,
    banned_tokens: Annotated[
        str | None, typer.Option(metavar="ID,...", help="Never choose these tokens: 15,16.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Choose no end token before so many other tokens.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not end the answer at an end token.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the random choice. The same seed gives the same text. Without this option: a random one."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text. You can give this option more than once."),
    ] = None,
    allow_special: Annotated[
        bool,
        typer.Option(
            "--allow-special",
            help="Encode the text of a special token in a message as that token, as transformers does.",
        ),
    ] = False,
) -> dict[str, Any]:
    """The options of a generation, as `Session.events` takes them."""
    check_texts({"--stop": stop})
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(_bias(one) for one in _listed(logit_bias)),
        "banned_tokens": [
            _number("--banned-tokens", one, int, "write ids: 15,16") for one in _listed(banned_tokens)
        ],
        "min_tokens": min_tokens,
        "ignore_eos": ignore_eos,
        "seed": seed,
        "stop": tuple(stop or ()),
        "allow_special": allow_special,
    }


GENERATION = tuple(inspect.signature(_generation).parameters)
"""The names of the options of a generation, those of `Session.events`."""


def with_generation(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a generation. It gets them together, as `generation`.

    defaults: where they are other than those of `Session.events`.
    """
    more = inspect.signature(_generation, eval_str=True).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: given.pop(name) for name in GENERATION}
            command(**given, generation=_generation(**options))

        parameters: list[inspect.Parameter] = []
        for name, parameter in own.parameters.items():
            if name == "generation":
                changed = (one.replace(default=defaults.get(one.name, one.default)) for one in more.values())
                parameters += changed
            else:
                parameters.append(parameter)
        # What typer looks at.
        vars(run)["__signature__"] = own.replace(
            parameters=[one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _listed(option: str | None) -> list[str]:
    return [] if option is None else option.split(",")


def _bias(option: str) -> tuple[int, float]:
    token, _, more = option.partition("=")
    hint = "write ids with their numbers: 15=2.5,16=-1"
    return _number("--logit-bias", token, int, hint), _number("--logit-bias", more, float, hint)


def _number(option: str, text: str, kind: Callable[[str], _T], hint: str) -> _T:
    try:
        return kind(text)
    except ValueError:
        raise RunError(f"{option} has {text!r}", hint=hint) from None
