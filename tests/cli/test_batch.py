"""`run --file`: many prompts at once, JSON lines in and out."""

from __future__ import annotations

import fcntl
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, Result, failed
from terminal import Terminal

import bedplate
from bedplate.cli.requests import Defaults, Request, answered
from bedplate.cli.unfinished import unfinished
from bedplate.errors import BedplateError, RunError
from bedplate.runtime.session import Session

SHORT = ("--max-tokens", 8)


def lines(*objects: Any) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run(command: Command, toy_bundle: bedplate.Bundle, tmp_path: Path) -> Any:
    """Answer lines of a file."""

    def run(text: str | bytes, *options: object) -> Result:
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return command("run", toy_bundle.path, "--file", file, *SHORT, *options)

    return run


def test_each_line_is_answered_as_it_is_alone(run: Any, toy_bundle: bedplate.Bundle) -> None:
    talk = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "so?"},
    ]
    given = [
        {"prompt": "the fox"},
        {"prompt": "the dog", "adapter": "all", "id": "a dog"},
        {"messages": talk, "adapter": "all2", "scale": 0.5, "id": 77},
        {"messages": [{"role": "system", "content": "be brief"}, *talk], "adapter": None},
        {"prompt": "a box", "temperature": 2.0, "top_p": 0.9, "max_tokens": 3, "seed": 5},
        {"prompt": "a jug", "logit_bias": {"70": 100}, "stop": "zz", "ignore_eos": True},
    ]
    result = run(lines(*given), "--system", "be kind", "--parallel", 3)
    assert result.code == 0
    found = records(result.out)
    assert [one["id"] for one in found] == [1, "a dog", 77, 4, 5, 6]
    with bedplate.Engine(toy_bundle) as engine:
        for fields, record in zip(given, found, strict=True):
            session = engine.session()
            session.use(fields.get("adapter"), scale=fields.get("scale", 1.0))
            messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": "be kind"}, *messages]
            options = {
                name: value
                for name, value in fields.items()
                if name in ("temperature", "top_p", "seed", "ignore_eos")
            }
            if "logit_bias" in fields:
                options |= {"logit_bias": {70: 100}, "stop": ["zz"]}
            text = session.generate(messages, max_tokens=fields.get("max_tokens", 8), **options)
            assert record["text"] == text
            for name in ("finish_reason", "prompt_tokens", "generated_tokens"):
                assert record[name] == getattr(session.last, name)
            assert (record["adapter"], record["scale"]) == (session.adapter, session.scale)
    assert found[4]["seed"] == 5
    assert result.err.startswith("6 lines, ") and result.err.count("\n") == 1


def test_options_of_the_command_hold_where_a_line_says_nothing(run: Any, toy_bundle: bedplate.Bundle) -> None:
    given = lines(
        {"prompt": "the fox"}, {"prompt": "the fox", "adapter": "all2"}, {"prompt": "the fox", "scale": 1}
    )
    found = records(
        run(given, "--adapter", "all", "--scale", 0.5, "--raw", "--seed", 3, "--temperature", 1).out
    )
    assert [(one["adapter"], one["scale"], one["seed"]) for one in found] == [
        ("all", 0.5, 3),
        ("all2", 1.0, 3),
        ("all", 1, 3),
    ]
    with bedplate.Engine(toy_bundle) as engine:
        session = engine.session()
        session.use("all", scale=0.5)
        assert found[0]["text"] == session.generate("the fox", max_tokens=8, temperature=1.0, seed=3)


def test_lines_of_stdin(command: Command, toy_bundle: bedplate.Bundle) -> None:
    data = (
        b"\xef\xbb\xbf"
        + lines({"prompt": "the fox"}).encode()
        + b"\r\n  \n"
        + lines({"prompt": "h\u00e9"}).encode().rstrip()
    )
    result = command("run", toy_bundle.path, "--file", "-", *SHORT, stdin=data)
    assert result.code == 0 and [one["id"] for one in records(result.out)] == [1, 4]
    nothing = command("run", toy_bundle.path, "--file", "-", stdin="")
    assert (nothing.code, nothing.out) == (0, "")


WRONG: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b'{"prompt": "caf\xe9"}', "not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not JSON"),
    (b'["x"]', "the value is ['x']"),
    (b'{"prompt": "x", "temprature": 1}', "unknown field 'temprature'"),
    (b"{}", "it needs one prompt"),
    (b'{"prompt": "x", "messages": []}', "it needs one prompt"),
    (b'{"prompt": 5}', "prompt is 5"),
    (b'{"prompt": "\\ud800"}', "prompt is not text"),
    (b'{"messages": {}}', "messages is {}"),
    (b'{"messages": []}', "there are no messages"),
    (b'{"messages": [{"role": "user", "content": 5}]}', "the content is 5"),
    (b'{"messages": [5, 6]}', "not a message: 5"),
    (b'{"prompt": "x", "id": 1.5}', "id is 1.5"),
    (b'{"prompt": "x", "id": true}', "id is True"),
    (b'{"prompt": "x", "id": "\\udce9"}', "id is not text"),
    (b'{"prompt": "x", "adapter": "nosuch"}', "no adapter 'nosuch'"),
    (b'{"prompt": "x", "adapter": 5}', "the adapter's name is 5"),
    (b'{"prompt": "x", "scale": 2}', "the base has nothing to scale"),
    (b'{"prompt": "x", "temperature": "hot"}', "temperature is 'hot'"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN is not a number of JSON"),
    (b'{"prompt": "x", "max_tokens": 0}', "max_tokens is 0"),
    (b'{"prompt": "x", "logit_bias": {"x": 1}}', "logit_bias has 'x'"),
    (b'{"prompt": "x", "logit_bias": {"1_0": 1}}', "logit_bias has '1_0'"),
    (b'{"prompt": "x", "logit_bias": {"010": 1}}', "logit_bias has '010'"),
    (b'{"prompt": "x", "logit_bias": {"999": 1}}', "token 999 is not in the vocabulary"),
    (b'{"prompt": "x", "stop": [""]}', "stop is ['']"),
    (json.dumps({"prompt": "dog " * 400, "id": "long"}).encode(), "do not fit the context of 256"),
]


def test_a_wrong_line_has_a_record_of_its_own(run: Any) -> None:
    right = lines({"prompt": "the fox"}).encode()
    data = right + b"".join(line + b"\n" + right for line, _ in WRONG)
    result = run(data, "--parallel", 4)
    assert result.code == 2
    assert f"{len(WRONG)} of {2 * len(WRONG) + 1} lines have no answer\nhint: " in result.err
    first, *found = records(result.out)
    for wrong, after, (_, words) in zip(found[::2], found[1::2], WRONG, strict=True):
        assert words in wrong["error"]["what"], wrong
        assert wrong["error"]["hint"] and f"prompts.jsonl:{after['id'] - 1}" in wrong["error"]["where"]
        assert after["text"] == first["text"]
    assert found[-2]["id"] == "long" and found[0]["id"] == 2
    assert found[22]["error"]["where"].endswith(":24: messages[0].content")


def test_so_many_are_open_at_once(toy_bundle: bedplate.Bundle) -> None:
    """Whichever ends, the next begins, also where the first takes longest."""
    counts = [40, *[2, 3, 4] * 5]
    ended = 0

    def requests() -> Iterator[Request | BedplateError]:
        for at, count in enumerate(counts):
            assert at - ended < 4, "too many are open"
            yield Defaults(generation={"max_tokens": count, "ignore_eos": True}).request(
                {"prompt": "the fox"}
            )

    order = []
    with bedplate.Engine(toy_bundle) as engine:
        for at, answer in answered(engine, requests(), 4):
            ended += 1
            order.append(at)
            assert answer.session is not None and answer.session.last is not None
            assert answer.session.last.generated_tokens == counts[at]
    assert sorted(order) == list(range(len(counts))) and order[-1] == 0


# --- A file for the output ------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that were computed. The fourth `stop` is as a Ctrl-C."""
    found: list[str] = []
    events = Session.events

    def watched(self: Session, prompt: Any, **options: Any) -> Any:
        if prompt == "stop" and found.count("stop") == 0:
            found.append("stop")
            raise KeyboardInterrupt
        found.append(prompt)
        return events(self, prompt, **options)

    monkeypatch.setattr(Session, "events", watched)
    return found


def test_an_output_is_there_when_all_is_done(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    given = lines({"prompt": "the fox"}, {"prompt": "the dog", "id": "\u00e9"})
    output.write_text("an older one")
    result = run(given, "--seed", 1, "--output", output)
    assert (result.code, result.out) == (0, "")
    assert records(output.read_text()) == records(run(given, "--seed", 1).out)
    assert "\u00e9" in output.read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    wrong = run(given + "{\n", "--output", output)
    assert wrong.code == 2 and [*records(output.read_text())[2]] == ["id", "error"]


def test_an_interrupted_run_goes_on(run: Any, asked: list[str], tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    given = lines(*({"prompt": text} for text in ("a", "b", "{", "stop", "c")))
    options = ("--raw", "--seed", 1, "--output", output, "--parallel", 1)
    stopped = run(given, *options)
    assert stopped.code == 130 and not output.exists()
    assert f"the answers so far are in {output}.part: the same command goes on from there" in stopped.err
    with (tmp_path / "answers.jsonl.part").open("ab") as part:
        part.write(b"0" * 64 + b'{"id": 3, "te')  # killed while it wrote
    went_on = run(given, *options)
    assert went_on.code == 0 and "5 lines, 3 of them before, " in went_on.err
    assert asked == ["a", "b", "{", "stop", "stop", "c"]
    assert records(output.read_text()) == records(run(given, "--raw", "--seed", 1).out)
    assert not (tmp_path / "answers.jsonl.part").exists()


@pytest.mark.parametrize("change", ["a line", "an option"])
def test_answers_to_something_else_do_not_count(
    run: Any, asked: list[str], tmp_path: Path, change: str
) -> None:
    output = tmp_path / "answers.jsonl"
    options = ("--raw", "--seed", 1, "--output", output, "--parallel", 1)
    run(lines(*({"prompt": text} for text in ("a", "b", "stop"))), *options)
    given = lines(*({"prompt": text} for text in ("a", "c" if change == "a line" else "b", "stop")))
    more = () if change == "a line" else ("--temperature", 2)
    assert run(given, *options, *more).code == 0
    again = ["c", "stop"] if change == "a line" else ["a", "b", "stop"]
    assert asked == ["a", "b", "stop", *again]
    assert records(output.read_text()) == records(run(given, "--raw", "--seed", 1, *more).out)


def test_a_full_disk_loses_no_answer(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    given = lines({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # room for two of them
    try:
        full = run(given, "--seed", 1, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.code == 2 and f"error: {output}.part: File too large\nhint: " in full.err
    assert "note: the answers so far are in" in full.err and not output.exists()
    went_on = run(given, "--seed", 1, "--output", output)
    assert went_on.code == 0 and "of them before" in went_on.err
    assert records(output.read_text()) == records(run(given, "--seed", 1).out)


def test_nothing_is_left_of_a_run_that_has_no_answer(run: Any, asked: list[str], tmp_path: Path) -> None:
    stopped = run(lines({"prompt": "stop"}), "--raw", "--output", tmp_path / "answers.jsonl")
    assert stopped.code == 130 and "so far" not in stopped.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_mistakes(run: Any, command: Command, toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    bundle, given = toy_bundle.path, lines({"prompt": "x"})
    failed(command("run", bundle), "there must be one prompt", "--file")
    failed(run(given, "-p", "x"), "there must be one prompt")
    failed(command("run", bundle, "-p", "x", "--output", "y"), "--output without --file")
    failed(command("run", bundle, "--file", tmp_path / "none.jsonl"), "none.jsonl: No such file")
    failed(run(given, "--parallel", 0), "parallel is 0")
    assert run(given, "--parallel", 10**20).code == 0
    failed(run(given, "--adapter", "nosuch"), "no adapter 'nosuch'")
    failed(run(given, "--output", tmp_path / "prompts.jsonl"), "it is the file of the prompts")
    assert (tmp_path / "prompts.jsonl").read_text() == given and len(list(tmp_path.iterdir())) == 1
    failed(run(given, "--output", tmp_path), f"{tmp_path}: it is not a file")
    failed(run(given, "--output", "/dev/null"), "/dev/null: it is not a file")
    failed(run(given, "--output", tmp_path / "no" / "x"), "No such file or directory")
    with (tmp_path / "x.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        failed(run(given, "--output", tmp_path / "x"), "another run writes this output")


def test_a_run_that_ends_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file beside the output goes between the moments when another run opens it and locks it."""
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / "x.part").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match="another run writes this output"), unfinished(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_progress_is_for_terminals(run: Any, toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    assert "answers" not in run(lines({"prompt": "x"}, {"prompt": "y", "max_tokens": 30})).err
    args = ["run", toy_bundle.path, "--file", tmp_path / "prompts.jsonl", "--max-tokens", 4]
    to_file = Terminal([*args, "--output", tmp_path / "out.jsonl"])
    shown = to_file.until("2 lines, ")
    assert to_file.end() == 0 and "answers" in shown and "2/2" in shown
    to_terminal = Terminal(args)
    shown = to_terminal.until("2 lines, ")
    assert to_terminal.end() == 0 and "answers" not in shown and '{"id": 1, "text": ' in shown
    for one in (to_file, to_terminal):
        one.close()
