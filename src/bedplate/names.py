"""How constants are named: by their module path and parameter, by their part, and by what is joined.

A quantized matrix is two constants, `….weight#codes` and `….weight#scales`. Linears that one operator computes
together have one constant: with their rows one below the other (`….q_proj+k_proj+v_proj.weight`), or along a diagonal
(`….q_proj&k_proj&v_proj.lora_b.weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

CODES, SCALES = "#codes", "#scales"
# Of a linear, for adapters with DoRA: no program has it.
ROW_NORMS = "row_norms"

Way = Literal["+", "&"]
ROWS: Way = "+"
DIAGONAL: Way = "&"

# A key in a program, which names a constant by its content: a flatbuffer's string, which is its length, the characters
# and a zero byte. ExecuTorch names scales by the key of their bytes after `scale_`.
KEY_IN_PROGRAM = re.compile(rb"(?:\x40\0\0\0|\x46\0\0\0scale_)([0-9a-f]{64})\0")

_LINEAR = re.compile(r"(?<=\.)[qkv]_proj(?=\.)")
# No more than three: of a name from a stranger, each part could be as long as the name.
_JOINED = re.compile(r"(?<=\.)[qkv]_proj(?:([+&])[qkv]_proj){1,2}(?=\.)")
_ITEM_BITS = {"float32": 32, "int64": 64, "bfloat16": 16, "int8": 8, "uint8": 8, "int4": 4}


def kin(name: str) -> str | None:
    """What the names of constants that can be joined have in common. None: this constant cannot be joined."""
    return _LINEAR.sub("*", name) if len(_LINEAR.findall(name)) == 1 else None


def joined_name(names: Sequence[str], way: Way) -> str:
    """The name of the constant that joins these: `a.q_proj.weight`, `a.k_proj.weight` …"""
    linears = way.join(_LINEAR.findall(name)[0] for name in names)
    return _LINEAR.sub(linears, names[0])


def parts_of(name: str) -> tuple[str, ...]:
    """The names of the constants that this one joins. Its own name, if it joins none."""
    match = _joined(name)
    if match is None:
        return (name,)
    return tuple(name[: match.start()] + one + name[match.end() :] for one in match[0].split(match[1]))


def _joined(name: str) -> re.Match[str] | None:
    # Most names are not joined. To see that of a thousand names takes less time than to search in them.
    return _JOINED.search(name) if ROWS in name or DIAGONAL in name else None


def way_of(name: str) -> Way | None:
    """How a constant is joined. None: it is not joined."""
    match = _joined(name)
    return None if match is None else (ROWS if match[1] == ROWS else DIAGONAL)


def nbytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """How many bytes the data of a constant has. None: no constant has this dtype."""
    bits = _ITEM_BITS.get(dtype)
    return None if bits is None else math.prod(shape) * bits // 8
