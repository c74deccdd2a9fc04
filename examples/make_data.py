"""Write the examples that the two adapters learn from and are tested on, as JSON lines.

    python examples/make_data.py            # examples/data/{extract,sentiment}.{train,heldout}.jsonl

A line is {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}. A held-out sentence never
occurs in training; half of its words and a quarter of its templates were never seen there. The files
follow from the seed alone: of `random`, only `random()` is used, the one method whose sequence Python
promises to keep.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import words
from words import Pool

T = TypeVar("T")
DATA = Path(__file__).parent / "data"
LABELS = ("positive", "negative", "mixed")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question and the answer that is right."""

    prompt: str
    answer: str

    def line(self) -> str:
        turns = [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


class Draw:
    """Random choices; with `held_out`, from the unseen words as well."""

    def __init__(self, seed: int, *, held_out: bool) -> None:
        self._random = random.Random(seed)
        self._held_out = held_out

    def chance(self, p: float) -> bool:
        return self._random.random() < p

    def integer(self, low: int, high: int) -> int:
        """A whole number, low ≤ n ≤ high."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, of: tuple[T, ...]) -> T:
        return of[self.integer(0, len(of) - 1)]

    def word(self, pool: Pool, unseen: float = 0.5) -> str:
        """A word of the pool; in held-out data, with probability `unseen`, one that training lacks."""
        if self._held_out and pool.unseen and self.chance(unseen):
            return self.one(pool.unseen)
        return self.one(pool.seen)


def extract_example(draw: Draw) -> Example:
    """A sentence about an order, a booking or a contact → the JSON object of its fields."""
    templates, fields, spoken = draw.one((_order, _booking, _contact))(draw)
    sentence = draw.word(templates, 0.25).format(**spoken)
    prompt = f"Reply with JSON: {', '.join(fields)}.\n{sentence[0].upper()}{sentence[1:]}"
    return Example(prompt=prompt, answer=json.dumps(fields, ensure_ascii=False))


# A kind of sentence: its templates, the fields of the answer, and the words that fill a template.
Kind = tuple[Pool, dict[str, str | int], dict[str, str]]


def _order(draw: Draw) -> Kind:
    item, city, day = draw.word(words.ITEMS), draw.word(words.CITIES), draw.word(words.DAYS)
    quantity = draw.integer(2, 12) if draw.chance(0.6) else draw.integer(13, 250)
    fields: dict[str, str | int] = {"item": item, "quantity": quantity, "city": city, "day": day}
    spoken = {"count": _count(draw, quantity), "item": item, "city": city}
    return words.ORDERS, fields, spoken | _spoken_day(day)


def _booking(draw: Draw) -> Kind:
    name, day, guests = _name(draw), draw.word(words.DAYS), draw.integer(2, 12)
    time, spoken_time = _time(draw)
    fields: dict[str, str | int] = {"name": name, "guests": guests, "day": day, "time": time}
    spoken = {"count": _count(draw, guests), "name": name, "time": spoken_time}
    return words.BOOKINGS, fields, spoken | _spoken_day(day)


def _contact(draw: Draw) -> Kind:
    name, job = _name(draw), draw.word(words.JOBS)
    phone = f"{draw.integer(200, 999)}-{draw.integer(0, 9999):04d}"
    fields: dict[str, str | int] = {"name": name, "job": job, "phone": phone}
    a_job = f"{'an' if job[0] in 'aeiou' else 'a'} {job}"
    return words.CONTACTS, fields, {"name": name, "job": job, "a_job": a_job, "phone": phone}


def _spoken_day(day: str) -> dict[str, str]:
    return {"day": day, "on_day": day if day in ("today", "tomorrow") else f"on {day}"}


def _name(draw: Draw) -> str:
    first = draw.word(words.FIRST_NAMES)
    return f"{first} {draw.word(words.LAST_NAMES)}" if draw.chance(0.7) else first


def _count(draw: Draw, n: int) -> str:
    return words.NUMBERS[n - 2] if n <= 12 and draw.chance(0.5) else str(n)


def _time(draw: Draw) -> tuple[str, str]:
    """A time of day as 24-hour HH:MM, and as said: the same, or "7 pm"."""
    hour, minute = draw.integer(12, 21), draw.one((0, 15, 30, 45))
    if hour > 12 and draw.chance(0.4):
        return f"{hour}:00", f"{hour - 12} pm"
    return f"{hour}:{minute:02d}", f"{hour}:{minute:02d}"


def sentiment_example(draw: Draw) -> Example:
    """A review of one or two opinions → positive, negative, or mixed."""
    label = draw.one(LABELS)
    first_good = label == "positive" or (label == "mixed" and draw.chance(0.5))
    if label != "mixed" and draw.chance(0.3):
        opinion, _ = _opinion(draw, first_good, aspect=draw.word(words.ASPECTS))
        review = f"{_capital(opinion)}."
    else:
        second_good = first_good if label != "mixed" else not first_good
        joint = draw.one(words.APART if label == "mixed" else words.ALIKE)
        first, aspect = _opinion(draw, first_good, aspect=draw.word(words.ASPECTS))
        second, _ = _opinion(draw, second_good, aspect=_other(draw, aspect))
        review = joint.format(first=first, First=_capital(first), second=second, Second=_capital(second))
    opener = draw.word(words.OPENERS)
    return Example(
        prompt=f"Is this review positive, negative or mixed?\n{opener} {review}".replace("\n ", "\n"),
        answer=label,
    )


def _opinion(draw: Draw, good: bool, *, aspect: str) -> tuple[str, str]:
    phrase = draw.word(words.GOOD if good else words.BAD)
    return phrase.format(a=f"the {aspect}"), aspect


def _other(draw: Draw, aspect: str) -> str:
    while (other := draw.word(words.ASPECTS)) == aspect:
        pass
    return other


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the examples of a task are made, and how many."""

    make: Callable[[Draw], Example]
    seed: int
    train: int
    held_out: int


TASKS = {
    "extract": Task(make=extract_example, seed=11, train=4000, held_out=150),
    "sentiment": Task(make=sentiment_example, seed=23, train=3000, held_out=150),
}


def make_task(name: str) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples) of a task; no prompt occurs twice, within or across the two."""
    task = TASKS[name]
    taken: set[str] = set()
    held_out = _take(_stream(task, task.seed, held_out=True), task.held_out, taken)
    return _take(_stream(task, task.seed + 1, held_out=False), task.train, taken), held_out


def _stream(task: Task, seed: int, *, held_out: bool) -> Iterator[Example]:
    draw = Draw(seed, held_out=held_out)
    while True:
        yield task.make(draw)


def _take(stream: Iterator[Example], count: int, taken: set[str]) -> list[Example]:
    examples: list[Example] = []
    for example in stream:
        if example.prompt not in taken:
            taken.add(example.prompt)
            examples.append(example)
        if len(examples) == count:
            break
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DATA, help="folder for the files (default: %(default)s)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        for part, examples in zip(("train", "heldout"), make_task(name), strict=True):
            text = "".join(example.line() for example in examples)
            (out / f"{name}.{part}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
