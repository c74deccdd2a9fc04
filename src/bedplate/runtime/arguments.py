"""What callers give, checked before anything runs: the type and the range of every argument, in one place.

Each function returns the argument in the type that the rest of the runtime works with, or raises a RunError that names
it.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn, TypeVar

from bedplate.errors import ArgumentError, RunError

_T = TypeVar("_T")
_SHOWN = 60  # characters of a value in an error
_DIGITS = 19  # of an id: it fits 64 bits


def integer(name: str, value: Any, *, least: int) -> int:
    """A whole number, also of numpy; neither True nor 2.0 is one."""
    hint = f"give a whole number, at least {least}"
    try:
        number = _refuse(name, value, hint) if isinstance(value, bool) else operator.index(value)
    except TypeError:
        _refuse(name, value, hint)
    if number < least:
        _refuse(name, value, hint)
    return number


def count(name: str, value: Any, *, least: int = 0) -> int:
    """A number of tokens that the native layer is given. More than any model has are as many as that."""
    return min(integer(name, value, least=least), 2**32)


def real(name: str, value: Any, hint: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(name, value, hint)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(name, value, hint)
    return number


def scale(value: Any, name: str = "scale") -> float:
    """What an adapter's branches are multiplied by: a finite number of 32 bits."""
    hint = "give a finite number: 1.0 is the adapter as it is"
    number = real(name, value, hint)
    try:
        struct.pack("<f", number)
    except OverflowError:
        _refuse(name, value, hint)
    return number + 0.0  # 0 has no sign


def adapters(chosen: Any, factor: Any = 1.0) -> dict[str, float]:
    """The adapters that a session is to use, each with its scale: of one name, `factor`; none: the base."""
    hint = "give text, a mapping from names to scales, or None for the base"
    one = scale(factor)
    if isinstance(chosen, str):
        return {chosen: one}
    if one != 1:
        what = "the base has nothing to scale" if chosen is None else "each adapter has its own"
        raise RunError(f"scale is {shown(factor)}, and {what}", hint="name one adapter")
    found = dict(instance("the adapter's name", {} if chosen is None else chosen, Mapping, hint))
    for name in found:
        instance("the adapter's name", name, str, hint)
    return {name: scale(found[name], f"the scale of {name}") for name in sorted(found)}


def instance(name: str, value: Any, kind: type[_T] | tuple[type[_T], ...], hint: str) -> _T:
    """An object of a class."""
    if not isinstance(value, kind):
        _refuse(name, value, hint)
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    return instance(name, value, bool, "give True or False")


def one_of(name: str, value: Any, allowed: tuple[_T, ...]) -> _T:
    """One of some values."""
    if value not in allowed:
        _refuse(name, value, f"one of {', '.join(map(repr, allowed))}")
    return allowed[allowed.index(value)]


def function(name: str, value: Any, hint: str) -> None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        _refuse(name, value, hint)


def text(name: str, value: Any) -> str:
    """Text that UTF-8 can write. Python keeps bytes that are not UTF-8, of a command line say, as lone surrogates."""
    string = instance(name, value, str, "give text (a Python str)")
    try:
        string.encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{name} is not text: its character {error.start} is half of a surrogate pair",
            hint="bytes that are not UTF-8 become such characters: give the text in UTF-8",
        ) from None
    return string


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts that are not empty."""
    hint = 'give a list of strings that are not empty: ["\\n\\n"]'
    if isinstance(value, str) or not isinstance(value, Sequence):
        _refuse(name, value, hint)
    if not all(isinstance(one, str) and one for one in value):
        _refuse(name, value, hint)
    return tuple(text(f"{name}[{i}]", one) for i, one in enumerate(value))


def token_ids(value: Any, name: str = "token_ids") -> list[int]:
    """Ids of tokens: whole numbers from 0, also as an array of numpy or torch."""
    hint = "give a list of whole numbers: engine.tokenizer.encode(text) gives one"
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        _refuse(name, value, hint)
    try:
        ids = [-1 if isinstance(one, bool) else operator.index(one) for one in value]
    except TypeError:  # an item, or an array without a dimension
        _refuse(name, value, hint)
    if wrong := [one for one in ids if not 0 <= one < 2**32]:
        raise ArgumentError(name, f"token {wrong[0]} is not in the vocabulary", hint=hint)
    return ids


def token_of(name: object) -> int | None:
    """The token that a name in JSON stands for: its id, in decimal. None: it stands for none."""
    digits = str(name)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS):
        return None
    token = int(digits)
    return token if str(token) == digits else None  # a token has one name


def _refuse(name: str, value: Any, hint: str) -> NoReturn:
    raise RunError(f"{name} is {shown(value)}", hint=hint)


def shown(value: Any) -> str:
    """A value as an error shows it: its beginning."""
    try:
        written = repr(value)
    except Exception:  # nested too deep, or of a class that fails
        return f"of type {type(value).__name__}"
    return written if len(written) <= _SHOWN else written[: _SHOWN - 1] + "…"
