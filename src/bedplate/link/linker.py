"""Template and keys → program. A plain relocation: 64 characters for 64 characters, nothing moves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from bedplate.constants import KEY_LENGTH, Constant

# What a program's constant methods return, by name.
Metadata = Mapping[str, int | bool | Sequence[int]]

_HOLE = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """The bytes of a program in which a placeholder stands for each symbol's key.

    holes: symbol → offsets of its placeholders. fixed: constants that depend on the structure alone, by symbol.
    """

    data: bytes
    holes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, Constant]

    def fixed_constants(self) -> list[Constant]:
        """The fixed constants, by name: a template from the cache holds them in another order than one just made."""
        return [self.fixed[symbol] for symbol in sorted(self.fixed)]

    @classmethod
    def find_holes(cls, data: bytes, symbol_of: Mapping[str, str], *, fixed: Mapping[str, Constant]) -> Self:
        """Find every placeholder of `symbol_of` (placeholder → symbol) in `data`."""
        holes: dict[str, list[int]] = {symbol: [] for symbol in symbol_of.values()}
        for match in _HOLE.finditer(data):
            symbol = symbol_of.get(match[0].decode())
            if symbol is not None:
                holes[symbol].append(match.start())
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
