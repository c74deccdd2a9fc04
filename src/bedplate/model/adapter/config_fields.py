"""Fields of an adapter's config by name, with checks of their types; and how their values stand in an error."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bedplate.errors import AdapterError
from bedplate.model.adapter.types import AGAIN


class ConfigFields:
    """Fields by name, with checks of their types. Each raises AdapterError."""

    def __init__(self, values: Mapping[str, Any], where: Path, *, within: str = "") -> None:
        self._values, self.where, self._within = values, where, within

    def get(self, field: str, default: Any) -> Any:
        return self._values.get(field, default)

    def items(self) -> list[tuple[str, Any]]:
        return sorted(self._values.items())

    def fail(self, what: str) -> NoReturn:
        raise AdapterError(what, where=self.where, hint=AGAIN)

    def flag(self, field: str, *, default: bool = False) -> bool:
        value = self.get(field, default)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{self._within}{field} must be true or false, got {short(value)}")
        return bool(value)

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 2**31:
            self.fail(f"{self._within}{name} must be a positive integer, got {short(value)}")
        return int(value)

    def number(self, name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be beyond any float, and then isfinite raises.
        if not is_number or abs(value) > 1e300 or math.isnan(value):
            self.fail(f"{self._within}{name} must be a number, got {short(value)}")
        return float(value)

    def names(self, field: str) -> tuple[str, ...]:
        """A list of names, or one."""
        value = self.get(field, None)
        value = [value] if isinstance(value, str) and value else value or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.fail(f"{self._within}{field} must be a list of names, got {short(value)}")
        return tuple(value)

    def names_or_pattern(self, field: str, *, default: tuple[str, ...]) -> str | tuple[str, ...]:
        """One string is a pattern. `default` stands for None."""
        value = self.get(field, None)
        if isinstance(value, str):
            self.check_pattern(field, value)
            return value
        return default if value is None else self.names(field)

    def integers(self, field: str) -> tuple[int, ...] | None:
        value = self.get(field, None)
        if value is None:
            return None
        value = [value] if type(value) is int else value
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            self.fail(f"{field} must be a list of integers, got {short(value)}")
        return tuple(value)

    def patterns(self, field: str) -> Iterator[tuple[str, str, Any]]:
        """(its name in an error, pattern, value), in the order of the file."""
        value = self.get(field, None) or {}
        if not isinstance(value, dict):
            self.fail(f"{field} must be an object, got {short(value)}")
        for pattern, of_pattern in value.items():
            self.check_pattern(field, pattern_form(pattern))
            yield f"{field}[{short(pattern)}]", pattern, of_pattern

    def check_pattern(self, field: str, pattern: str) -> None:
        try:
            with warnings.catch_warnings():  # of what another Python may read otherwise
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            self.fail(f"{field} holds {short(pattern)}, which is not a regular expression: {error}")


def pattern_form(pattern: str) -> str:
    """How PEFT matches the names in rank_pattern and alpha_pattern, from the start of a path."""
    return rf"(.*\.)?({pattern})$"


def layers_form(pattern: str) -> str:
    """How PEFT finds the number of a layer behind a name in layers_pattern, from the start of a path."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def saved_form(name: str) -> str:
    """How PEFT finds what modules_to_save takes out of target_modules, from the start of a path."""
    return rf"(^|.*\.){name}($|\..*)"


def short(value: Any) -> str:
    """A value of the file in an error, on one line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


def readable(name: str) -> str:
    """A name of the file in an error: what cannot be printed is escaped."""
    return name.encode("ascii", "backslashreplace").decode() if not name.isprintable() else name
