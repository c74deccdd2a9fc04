"""JSON ↔ dataclasses, strictly: every field is there, none is unknown, each has its type.

The text is canonical (sorted keys, two spaces, a final newline), so equal values are equal bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bedplate.errors import BundleError

_T = TypeVar("_T")


def dump(value: Any) -> bytes:
    """Canonical JSON of dataclasses, dicts, lists and plain values."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_fields)
    return text.encode() + b"\n"


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def load(data: bytes, where: str) -> Any:
    """Parse JSON that `dump` wrote. BundleError: it is not JSON, or not in canonical form (edited or
    damaged).
    """
    try:
        value = json.loads(data)
        canonical = dump(value) == data
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSON and UTF-8 errors, and numbers that JSON does not have
        raise BundleError(f"not JSON: {error}", where=where, hint=DAMAGED) from error
    if not canonical:
        raise BundleError("not as bedplate wrote it", where=where, hint=DAMAGED)
    return value


DAMAGED = "it was edited or is damaged: restore it from a copy, or build the bundle again"


def decode(kind: type[_T], value: Any, where: str) -> _T:
    """`value`, as `json.loads` gives it, as a `kind`: a dataclass, container, literal, or plain type, nested at will.

    where: the file, and the path in it, that errors name. BundleError: a field is missing, unknown, or of
    another type.
    """
    result: _T = _decode(kind, value, where)
    return result


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, _expect(dict, value, where), where)
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in items}
    if origin is tuple:
        items = enumerate(_expect(list, value, where))
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in items)
    if origin in (types.UnionType, Union):  # only `X | None` is used
        return None if value is None else _decode(arguments[0], value, where)
    if origin is Literal:
        if type(value) is str and value in arguments:
            return value
        raise BundleError(f"found {value!r:.80}, not one of {arguments}", where=where, hint=DAMAGED)
    return _expect(kind, value, where)


_hints = functools.cache(get_type_hints)  # they are asked for with every constant of a foundation


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    for name in hints:
        if name not in value:
            raise BundleError(f"the field {name!r} is missing", where=where, hint=DAMAGED)
    for name in value:
        if name not in hints:
            raise BundleError(f"unknown field {name!r}", where=where, hint=DAMAGED)
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


def _expect(kind: type, value: Any, where: str) -> Any:
    # JSON writes 32.0 and 32 for one number, and Python's bool is an int.
    fits = type(value) in (int, float) if kind is float else type(value) is kind
    if not fits:
        raise BundleError(f"expected {kind.__name__}, found {value!r:.80}", where=where, hint=DAMAGED)
    if kind is not float:
        return value
    try:
        return float(value)
    except OverflowError as error:
        what = f"a whole number of {len(str(value))} digits is too large"
        raise BundleError(what, where=where, hint=DAMAGED) from error
