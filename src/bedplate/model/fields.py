"""The fields of a config, each checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.spec_check import LARGEST_FACTOR, SMALLEST_FACTOR

# No model is so wide or so deep; a product of three such sizes still fits the integers of every library.
LARGEST = 2**20
_CORRECT = "correct this field, or download the file again"


@dataclass(frozen=True)
class Fields:
    """Fields by name. A field that is null is one that is not there.

    where: the file that errors name.  inside: the field that these are inside of; None: they are the whole file's.
    """

    values: Mapping[str, Any]
    where: str | Path
    inside: str | None = None

    def get(self, name: str) -> Any:
        """The field as it is; None: it is not there."""
        return self.values.get(name)

    def count(
        self, name: str, *, default: int | None = None, most: int = LARGEST, least: Literal[0, 1] = 1
    ) -> int:
        """A positive integer up to `most`. CheckpointError: it is none, or is missing and has no default.

        least: 0: it may be 0, too.
        """
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise self._missing(name)
        if type(value) is not int or value < least:
            raise self.wrong(name, "a positive integer" if least else "an integer that is not negative")
        if value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A positive, finite number. CheckpointError: it is none, or is missing and has no default."""
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise self._missing(name)
        # NaN compares as false; an integer that no float holds is compared all the same.
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise self.wrong(name, "a positive number")
        return float(value)

    def factor(self, name: str) -> float:
        """A number that a model's values may be multiplied with. CheckpointError: it is none, or is missing."""
        value = self.number(name)
        if not SMALLEST_FACTOR <= value <= LARGEST_FACTOR:
            raise self.wrong(name, f"between {SMALLEST_FACTOR:g} and {LARGEST_FACTOR:g}")
        return value

    def factor_or_none(self, name: str) -> float | None:
        """As `factor`; None when it is missing or null."""
        return None if self.get(name) is None else self.factor(name)

    def numbers(self, name: str, count: int) -> list[float]:
        """A list of `count` positive, finite numbers. CheckpointError: it is none."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(name, f"a list of {count} numbers")
        items = Fields({f"{name}[{i}]": item for i, item in enumerate(value)}, self.where, self.inside)
        return [items.number(item) for item in items.values]

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false; the default when it is missing. CheckpointError: it is neither."""
        value = self.get(name)
        if value is not None and type(value) is not bool:
            raise self.wrong(name, "true or false")
        return default if value is None else value

    def section(self, name: str) -> dict[str, Any]:
        """An object; empty when it is missing. CheckpointError: it is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value or {}

    def only(self, name: str, *allowed: Any, hint: str) -> None:
        """UnsupportedError: the field is there, and its value is none of those allowed."""
        if name not in self.values:
            return
        value = self.values[name]
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise UnsupportedError(f"{name} = {shown(value)} is not supported", where=self.where, hint=hint)

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self._named(name)} must be {wanted}, got {shown(self.get(name))}",
            where=self.where,
            hint=_CORRECT,
        )

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self._named(name)} is missing", where=self.where, hint=_CORRECT)

    def _named(self, name: str) -> str:
        return name if self.inside is None else f"{name} in {self.inside}"


def shown(value: Any) -> str:
    """A value as an error shows it: in Python's notation, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
