"""Commands that run a bundle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bedplate.bundle.store import Bundle
from bedplate.cli.making import BundlePath, KvPrecision
from bedplate.cli.output import print_error, print_json, show_prefill, stderr
from bedplate.cli.reading import check_texts, decode, standard_input
from bedplate.errors import BedplateError

if TYPE_CHECKING:
    from bedplate.runtime.request import Statistics
    from bedplate.runtime.session import Session

Adapter = Annotated[
    str | None, typer.Option(metavar="NAME", help="Adapter to use. Without this option: the base.")
]
Threads = Annotated[
    int | None, typer.Option(help="How many threads to use. Without this option: one for each physical core.")
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        help="How many positions a session can hold. Without this option: as many as the model has."
    ),
]
MaxTokens = Annotated[int, typer.Option(help="End after this many tokens.")]
Temperature = Annotated[
    float, typer.Option(help="How random the choice of tokens is. 0: always the most likely token.")
]
TopP = Annotated[
    float, typer.Option(help="Choose only among the most likely tokens that have this probability together.")
]
TopK = Annotated[int, typer.Option(help="Choose only among this many of the most likely tokens. 0: all.")]
MinP = Annotated[
    float,
    typer.Option(
        help="Choose only among tokens that have at least this part of the probability of the likeliest. 0: all."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Above 1: make tokens of the prompt and of the answer less likely. 1.1 is usual."),
]
PresencePenalty = Annotated[
    float, typer.Option(help="Above 0: make tokens that the answer has already less likely. From -2 to 2.")
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(help="Above 0: make tokens less likely each time that the answer has them. From -2 to 2."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the random choice. The same seed gives the same text. Without this option: a random one."
    ),
]
System = Annotated[str | None, typer.Option(help="The system message.")]
AllowSpecial = Annotated[
    bool,
    typer.Option(
        "--allow-special",
        help="Encode the text of a special token in a message as that token, as transformers does.",
    ),
]


def run(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question. -: read it from stdin.")],
    adapter: Adapter = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text. You can give this option more than once."),
    ] = None,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Use the prompt as it is, without the chat template.")
    ] = False,
    allow_special: AllowSpecial = False,
    threads: Threads = None,
    kv: KvPrecision = "float16",
    max_context: MaxContext = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and statistics as JSON.")] = False,
) -> None:
    """Answer one prompt. The text goes to stdout while it is made. Statistics go to stderr."""
    from bedplate.runtime.engine import Engine

    check_texts({"--prompt": prompt, "--system": system, "--stop": stop})
    text = decode(standard_input().read()) if prompt == "-" else prompt
    with Engine(Bundle.open(bundle), threads=threads, kv=kv, max_context=max_context) as engine:
        session = engine.session(adapter)
        pieces = session.generate(
            text if raw else _messages(system, text),
            on_prefill=show_prefill,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            allow_special=allow_special,
            stream=True,
        )
        if as_json:
            answer = "".join(pieces)
            print_json({"text": answer, "statistics": session.last})
            return
        _stream(pieces)
        _print_speed(session.last)


def chat(
    bundle: BundlePath,
    adapter: Adapter = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Seed = None,
    system: System = None,
    allow_special: AllowSpecial = False,
    threads: Threads = None,
    kv: KvPrecision = "float16",
    max_context: MaxContext = None,
) -> None:
    """Talk with the model. /use NAME switches to an adapter. /use without a name switches back to the base. /reset
    forgets the conversation. /quit ends the program.
    """
    from bedplate.runtime.engine import Engine

    check_texts({"--system": system})
    options = {
        "allow_special": allow_special,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    with Engine(Bundle.open(bundle), threads=threads, kv=kv, max_context=max_context) as engine:
        session = engine.session(adapter)
        history = _messages(system, None)
        while data := _ask(session.adapter):
            try:
                line = decode(data).rstrip("\n")
                command, _, argument = line.strip().partition(" ")
                if command == "/quit":
                    return
                if command == "/reset":
                    history = _messages(system, None)
                elif command == "/use":
                    session.use(None if argument in ("", "base") else argument)
                elif command.startswith("/"):
                    stderr.print(
                        "/use NAME switches to an adapter, /reset forgets the conversation, /quit ends the program"
                    )
                elif command:
                    history = _exchange(session, history, line, options)
            except BedplateError as error:
                print_error(error)  # the talk goes on, without what caused it
            except KeyboardInterrupt:
                stderr.print("interrupted: this question is not part of the conversation")


def _exchange(
    session: Session, history: list[dict[str, str]], question: str, options: dict[str, Any]
) -> list[dict[str, str]]:
    asked = [*history, {"role": "user", "content": question}]
    answer = _stream(session.generate(asked, stream=True, on_prefill=show_prefill, **options))
    _print_speed(session.last)
    return [*asked, {"role": "assistant", "content": answer}]


def _messages(system: str | None, user: str | None) -> list[dict[str, str]]:
    roles = (("system", system), ("user", user))
    return [{"role": role, "content": text} for role, text in roles if text is not None]


def _ask(adapter: str | None) -> bytes:
    stderr.print(f"[bold]{adapter or 'base'}>[/] ", end="")
    return standard_input().readline()


def _stream(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()  # before the numbers on stderr
    return text


def _print_speed(stats: Statistics | None) -> None:
    assert stats is not None, "a generation has just ended"
    decoded = max(stats.generated_tokens - 1, 0)
    speed = f"{decoded / stats.decode_seconds:.0f} tokens/s" if stats.decode_seconds > 0 and decoded else "–"
    stderr.print(
        f"[dim]{stats.prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s, "
        f"{stats.generated_tokens} generated, {speed}, ended by {stats.finish_reason}[/]"
    )
