"""JSON ↔ dataclasses, strictly: every field is there, none is unknown, each has its type.

A dataclass is an object. A named tuple, of which there are many, is an array: its values in the order of its fields.
The text is canonical (sorted keys, a line for each field of the document, a final newline), so equal values are equal
bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import stat
import types
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from operator import call
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from bedplate.errors import BundleError

_LARGEST = 1 << 26  # of some 300,000 constants; to decode it takes ten times as much memory
_T = TypeVar("_T")


def dump(document: dict[str, Any]) -> bytes:
    """Canonical JSON of a document: its fields hold dataclasses, named tuples, dicts, lists and plain values."""
    lines = (f"{_compact(name)}: {_compact(value)}" for name, value in sorted(document.items()))
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _compact(value: Any) -> str:
    # Without indentation: the encoder in C knows none, and takes a fraction of the time.
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_fields)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def read(path: Path) -> bytes:
    """The bytes of such a file. BundleError: it is no regular file, or is larger than any that a bundle has."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BundleError("it is not a regular file", where=path, hint=DAMAGED)
    if found.st_size > _LARGEST:
        raise BundleError(f"it has {found.st_size} bytes, more than {_LARGEST}", where=path, hint=DAMAGED)
    return path.read_bytes()


def load(data: bytes, where: str) -> dict[str, Any]:
    """Parse JSON that `dump` wrote. BundleError: it is not JSON, or not in canonical form (edited or
    damaged).
    """
    try:
        value = json.loads(data)
        canonical = isinstance(value, dict) and dump(value) == data
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSON and UTF-8 errors, and numbers that JSON does not have
        raise BundleError(f"not JSON: {error}", where=where, hint=DAMAGED) from error
    if not canonical:
        raise BundleError("not as bedplate wrote it", where=where, hint=DAMAGED)
    return value  # type: ignore[no-any-return]


DAMAGED = "it was edited or is damaged: restore it from a copy, or build the bundle again"


def decode(kind: type[_T], value: Any, where: str) -> _T:
    """`value`, as `json.loads` gives it, as a `kind`: a dataclass, named tuple, container, literal, or plain
    type, nested at will.

    where: the file, and the path in it, that errors name. BundleError: a field is missing, unknown, or of
    another type.
    """
    try:
        result: _T = _decoder(cast(Any, kind))(value)
    except _WrongError as error:
        path = "".join(reversed(error.path))
        raise BundleError(error.what, where=where + path, hint=DAMAGED) from None
    return result


class _WrongError(Exception):
    """What does not fit. path: from the inside out, for it is known only while the error rises."""

    def __init__(self, what: str) -> None:
        self.what, self.path = what, list[str]()


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """The function that decodes a kind. It is made once: a foundation has a thousand constants."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if dataclasses.is_dataclass(kind):
        return _fields_decoder(kind)
    if _is_row(kind):
        return _row_decoder(kind)
    if origin is dict:
        return functools.partial(_decode_dict, _decoder(arguments[1]))
    if origin is tuple:
        one = functools.partial(_decode_list, _decoder(arguments[0]))
        return _rows_decoder(arguments[0], one) if _is_row(arguments[0]) else one
    if origin in (types.UnionType, Union):  # only `X | None` is used
        inner = _decoder(arguments[0])
        return lambda value: None if value is None else inner(value)
    if origin is Literal:
        return functools.partial(_decode_literal, arguments)
    return _decode_float if kind is float else functools.partial(_expect, kind)


def _decode_dict(decode_item: Callable[[Any], Any], value: Any) -> dict[str, Any]:
    found = {}
    for name, item in _expect(dict, value).items():
        try:
            found[name] = decode_item(item)
        except _WrongError as error:
            error.path.append(f".{name}")
            raise
    return found


def _decode_list(decode_item: Callable[[Any], Any], value: Any) -> tuple[Any, ...]:
    items = _expect(list, value)
    try:
        return tuple(map(decode_item, items))
    except _WrongError as error:
        error.path.append(f"[{_first_wrong(map(decode_item, items))}]")
        raise


def _first_wrong(decoded: Iterator[Any]) -> int:
    """How many items decode before the first that does not. They decode in one go otherwise, which is faster."""
    count = 0
    with contextlib.suppress(_WrongError):
        for _ in decoded:
            count += 1
    return count


def _fields_decoder(kind: Any) -> Callable[[Any], Any]:
    decoders = {name: _decoder(hint) for name, hint in get_type_hints(kind).items()}

    def decode_fields(value: Any) -> Any:
        if type(value) is not dict or value.keys() != decoders.keys():
            _refuse_fields(decoders.keys(), _expect(dict, value))
        found = {}
        try:
            for name, decode_field in decoders.items():
                found[name] = decode_field(value[name])
        except _WrongError as error:
            error.path.append(f".{name}")
            raise
        return kind(**found)

    return decode_fields


def _row_decoder(kind: Any) -> Callable[[Any], Any]:
    names, decoders = kind._fields, [_decoder(hint) for hint in get_type_hints(kind).values()]

    def decode_row(value: Any) -> Any:
        if len(_expect(list, value)) != len(decoders):
            raise _WrongError(f"expected {', '.join(names)}, found {len(value)} values")
        try:
            return kind._make(map(call, decoders, value))
        except _WrongError as error:
            error.path.append(f".{names[_first_wrong(map(call, decoders, value))]}")
            raise

    return decode_row


def _is_row(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple)


def _rows_decoder(kind: Any, one_by_one: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decodes rows column by column, which takes a third of the time. one_by_one: finds what is wrong."""
    columns = [_column_decoder(hint) for hint in get_type_hints(kind).values()]

    def decode_rows(value: Any) -> Any:
        are_rows = type(value) is list and {*map(type, value)} <= {list}
        if not are_rows or {*map(len, value)} != {len(columns)}:
            return one_by_one(value)
        try:
            found = map(call, columns, zip(*value, strict=True))
            return tuple(map(functools.partial(tuple.__new__, kind), zip(*found, strict=True)))
        except _WrongError:
            return one_by_one(value)

    return decode_rows


def _column_decoder(kind: Any) -> Callable[[Any], Any]:
    """The function that decodes many values of a kind. _WrongError: one does not fit."""
    decode_one, plain = _decoder(kind), {str, int, bool}
    own = {*get_args(kind)} if get_origin(kind) in (types.UnionType, Union) else {kind}
    if own <= plain | {types.NoneType}:
        return lambda values: values if {*map(type, values)} <= own else [*map(decode_one, values)]
    if get_origin(kind) is tuple and get_args(kind)[0] in plain:
        return functools.partial(_decode_lists, get_args(kind)[0], decode_one)
    return lambda values: [*map(decode_one, values)]


def _decode_lists(kind: type, decode_one: Callable[[Any], Any], values: Any) -> Any:
    if {*map(type, values)} <= {list} and {*map(type, chain.from_iterable(values))} <= {kind}:
        return map(tuple, values)
    return [*map(decode_one, values)]


def _refuse_fields(wanted: Collection[str], found: Collection[str]) -> NoReturn:
    for name in wanted:
        if name not in found:
            raise _WrongError(f"the field {name!r} is missing")
    raise _WrongError(f"unknown field {next(name for name in found if name not in wanted)!r}")


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:  # Python's bool is an int
        raise _WrongError(f"expected {kind.__name__}, found {value!r:.80}")
    return value


def _decode_literal(allowed: tuple[Any, ...], value: Any) -> Any:
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise _WrongError(f"expected one of {', '.join(map(repr, allowed))}, found {value!r:.80}")
    return value


def _decode_float(value: Any) -> float:
    if type(value) is not int:  # JSON writes 32.0 and 32 for one number
        return _expect(float, value)  # type: ignore[no-any-return]
    try:
        return float(value)
    except OverflowError as error:
        raise _WrongError(f"a whole number of {len(str(value))} digits is too large") from error
