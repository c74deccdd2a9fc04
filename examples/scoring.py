"""Is an answer right? Pure functions over text, one scorer a task.

`exact` is the check that counts. `lenient` shows what an answer knows, whatever its form: for `extract`, the
share of fields that are right in the first JSON object of the answer; for `sentiment`, whether the first
label that the answer names is the right one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from make_data import LABELS


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out example: the conversation up to the answer, and the answer."""

    messages: list[dict[str, str]]
    answer: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """Both in 0..1."""

    exact: float
    lenient: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """Mean scores of `count` answers. model: what answered; adapter: None for the base."""

    model: str
    task: str
    adapter: str | None
    count: int
    exact: float
    lenient: float


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` examples of a file of make_data.py (None: all)."""
    with path.open(encoding="utf-8") as file:
        turns = [json.loads(line)["messages"] for line in file][:limit]
    return [Question(messages=messages[:-1], answer=messages[-1]["content"]) for messages in turns]


def score_extract(answer: str, expected: str) -> Score:
    """exact: the whole answer is JSON equal to the expected (key order aside, 2 is not "2")."""
    wanted: dict[str, Any] = json.loads(expected)
    found = _first_object(answer)
    right = sum(name in found and _same(found[name], value) for name, value in wanted.items())
    try:
        whole = json.loads(answer)
    except ValueError:
        whole = None
    exact = isinstance(whole, dict) and len(whole) == len(wanted) == right
    return Score(exact=float(exact), lenient=right / len(wanted))


def score_sentiment(answer: str, expected: str) -> Score:
    """exact: the answer is the label and nothing else, but for white space around it."""
    named = re.search(rf"\b({'|'.join(LABELS)})\b", answer.lower())
    return Score(
        exact=float(answer.strip() == expected), lenient=float(named is not None and named[0] == expected)
    )


SCORERS: dict[str, Callable[[str, str], Score]] = {"extract": score_extract, "sentiment": score_sentiment}


def _same(a: object, b: object) -> bool:
    return type(a) is type(b) and a == b


def _first_object(text: str) -> dict[str, Any]:
    """The first JSON object that stands anywhere in the text; {} when there is none."""
    decoder = json.JSONDecoder()
    for brace in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, brace.start())
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def summarize(
    *, model: str, task: str, adapter: str | None, answers: Sequence[str], questions: Sequence[Question]
) -> Result:
    """Score every answer and take the means."""
    pairs = zip(answers, questions, strict=True)
    scores = [SCORERS[task](answer, question.answer) for answer, question in pairs]
    return Result(
        model=model,
        task=task,
        adapter=adapter,
        count=len(scores),
        exact=sum(score.exact for score in scores) / len(scores),
        lenient=sum(score.lenient for score in scores) / len(scores),
    )


def to_markdown(results: Sequence[Result]) -> str:
    """A table, one row a result."""
    lines = ["| model | task | adapter | exact | lenient | n |", "|---|---|---|---|---|---|"]
    for r in results:
        lines.append(
            f"| {r.model} | {r.task} | {r.adapter or '-'} | {r.exact:.1%} | {r.lenient:.1%} | {r.count} |"
        )
    return "\n".join(lines) + "\n"


def to_json(results: Sequence[Result]) -> str:
    return json.dumps([asdict(result) for result in results], indent=2) + "\n"
