"""Template and keys → program. A plain relocation: 64 characters for 64 characters, nothing moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from bedplate.constants import KEY_LENGTH, Constant
from bedplate.names import KEY_IN_PROGRAM, way_of

# What a program's constant methods return, by name.
Metadata = Mapping[str, int | bool | Sequence[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """The bytes of a program in which a placeholder stands for each symbol's key.

    holes: symbol → offsets of its placeholders. fixed: constants that depend on the structure alone, by symbol.
    """

    data: bytes
    holes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, Constant]

    def joined(self) -> frozenset[str]:
        """Symbols of what is joined of several constants."""
        return frozenset(symbol for symbol in self.holes if way_of(symbol) is not None)

    @classmethod
    def find_holes(cls, data: bytes, symbol_of: Mapping[str, str], *, fixed: Mapping[str, Constant]) -> Self:
        """Find every placeholder of `symbol_of` (placeholder → symbol) in `data`."""
        holes: dict[str, list[int]] = {symbol: [] for symbol in symbol_of.values()}
        for match in KEY_IN_PROGRAM.finditer(data):
            symbol = symbol_of.get(match[1].decode())
            if symbol is not None:
                holes[symbol].append(match.start(1))
        missing = sorted(symbol for symbol, offsets in holes.items() if not offsets)
        assert not missing, f"symbols that the program does not name: {missing[:3]}"
        return cls(data=data, holes={symbol: tuple(at) for symbol, at in holes.items()}, fixed=fixed)


def link(template: Template, keys: Mapping[str, str]) -> bytes:
    """The program: `template` with the key of each symbol in its holes.

    keys: symbol → key of every symbol of the template that is not fixed; more do no harm.
    """
    program = bytearray(template.data)
    for symbol, offsets in template.holes.items():
        fixed = template.fixed.get(symbol)
        key = (fixed.key if fixed is not None else keys[symbol]).encode()
        assert len(key) == KEY_LENGTH
        for offset in offsets:
            program[offset : offset + KEY_LENGTH] = key
    return bytes(program)
