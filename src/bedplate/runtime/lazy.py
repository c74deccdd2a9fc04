"""Attributes that are found when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

_T = TypeVar("_T")


class lazy(Generic[_T]):  # noqa: N801
    """As `functools.cached_property`, which takes one lock for all objects before Python 3.12: in a process that is
    forked while another thread has it, nobody gives it up. Here, two threads may find a value at once.
    """

    def __init__(self, find: Callable[[Any], _T]) -> None:
        self._find = find
        self.__doc__ = find.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> Self: ...

    @overload
    def __get__(self, owner: object, kind: type) -> _T: ...

    def __get__(self, owner: object | None, kind: type) -> Self | _T:
        if owner is None:
            return self
        found = self._find(owner)
        vars(owner)[self._name] = found  # which is found before this is asked again
        return found
