"""Which program uses which constant: for `inspect`, and for the proof that a bundle shares what it should."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import Ptd, read_ptd
from bedplate.bundle.store import Bundle
from bedplate.errors import BundleError

BASE = "base"
_STATIC = "/static"  # no adapter's name has a slash


def static_name(name: str) -> str:
    """How the program of fixed shapes of the base or of an adapter is called beside its other one."""
    return name + _STATIC


@dataclass(frozen=True, kw_only=True)
class ConstantUse:
    """A constant of a bundle. owner: "foundation", or the adapter that holds it.  users: the existing programs that
    name it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    key: str
    owner: str
    users: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ProgramUse:
    """name: "base" or the adapter's, or its `static_name`.

    from_foundation, own: bytes that it uses of the foundation, of its own file.
    """

    name: str
    keys: int
    from_foundation: int
    own: int


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """foundation: bytes of all its constants.  shared: bytes of those that two or more programs use."""

    foundation: int
    shared: int
    programs: tuple[ProgramUse, ...]


def constants(bundle: Bundle) -> tuple[ConstantUse, ...]:
    """Every constant by name: the foundation's, then each adapter's own."""
    named = _keys_by_program(bundle)
    held = [("foundation", bundle.foundation_info.constants)]
    held += [(name, entry.info.constants) for name, entry in bundle.adapters.items()]
    return tuple(
        ConstantUse(
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            nbytes=info.nbytes,
            key=info.key,
            owner=owner,
            users=tuple(
                user
                for user, keys in named.items()
                if info.key in keys and owner in ("foundation", user.removesuffix(_STATIC))
            ),
        )
        for owner, infos in held
        for info in infos
    )


def sharing(bundle: Bundle) -> Sharing:
    """Prove that each program finds every key it names in exactly one of its data files, and count the bytes.

    For what was made without programs, there is nothing to prove.

    BundleError: a key is in none or in both of them, or an adapter holds constants that its program does not
    name (it would have no effect). Constants are reported by name.
    """
    foundation = read_ptd(bundle.foundation)
    named = _keys_by_program(bundle)
    own = {name: read_ptd(entry.weights) for name, entry in bundle.adapters.items()}
    problems = [
        f"{_label(bundle, key)} {problem}"
        for name, keys in named.items()
        for key, problem in _problems(name, keys, foundation, own.get(name.removesuffix(_STATIC)))
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = "add the adapter again, or build the bundle again"
        raise BundleError("; ".join(problems[:5]) + more, where=bundle.path, hint=hint)
    counts = Counter(key for keys in named.values() for key in keys)
    return Sharing(
        foundation=_nbytes(foundation, frozenset(foundation.entries)),
        shared=_nbytes(foundation, frozenset(key for key, count in counts.items() if count > 1)),
        programs=tuple(
            ProgramUse(
                name=name,
                keys=len(keys),
                from_foundation=_nbytes(foundation, keys),
                own=_nbytes(own[owner], keys) if owner in own else 0,
            )
            for name, keys in named.items()
            for owner in (name.removesuffix(_STATIC),)
        ),
    )


def _keys_by_program(bundle: Bundle) -> dict[str, frozenset[str]]:
    programs = {BASE: bundle.base_program, static_name(BASE): bundle.static_program}
    for name, entry in bundle.adapters.items():
        programs |= {name: entry.program, static_name(name): entry.static_program}
    return {name: program_keys(program) for name, program in programs.items() if program is not None}


def _problems(name: str, keys: frozenset[str], foundation: Ptd, own: Ptd | None) -> list[tuple[str, str]]:
    mine = own.entries.keys() if own is not None else frozenset()
    return [
        *(
            (key, f"is named by {name}, but none of its data files holds it")
            for key in keys - foundation.entries.keys() - mine
        ),
        *((key, f"is held by the foundation and by {name} too") for key in foundation.entries.keys() & mine),
        *((key, f"is held by {name}, whose program does not name it") for key in mine - keys),
    ]


def _label(bundle: Bundle, key: str) -> str:
    infos = [*bundle.foundation_info.constants]
    infos += [info for entry in bundle.adapters.values() for info in entry.info.constants]
    names = sorted({info.name for info in infos if info.key == key})
    return f"{names[0]} (key {key[:12]}…)" if names else f"the key {key}"


def _nbytes(ptd: Ptd, keys: frozenset[str]) -> int:
    """Bytes on disk behind those of `keys` that the file holds; keys with equal bytes share them."""
    return sum({entry.offset: entry.nbytes for key, entry in ptd.entries.items() if key in keys}.values())
