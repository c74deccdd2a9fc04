"""The constants of a bundle as float32 arrays, by name: for what is computed from them in numpy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bedplate.bundle.named import NamedConstants, Part, Source
from bedplate.constants import Constant
from bedplate.errors import BundleError
from bedplate.names import CODES
from bedplate.spec import ModelSpec, correction_places, linear_shapes

_EMBEDDING = "embed_tokens.weight"


class Values:
    """Reads constants as they are asked for, each without what it is joined with.

    ranks: of an adapter's branches, by the linear's name in a layer.
    BundleError: the file is damaged, or lacks what is asked for.
    """

    def __init__(
        self,
        constants: NamedConstants,
        spec: ModelSpec,
        ranks: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._constants, self._ranks = constants, ranks
        self._rows = {name: rows for name, (rows, _) in linear_shapes(spec).items()}
        self._places = {
            linear: place for place, linears in correction_places(spec).items() for linear in linears
        }

    def has(self, name: str) -> bool:
        return self._constants.has(name)

    def floats(self, name: str, count: int) -> NDArray[np.float32]:
        """float32 [count]."""
        names = self._constants.joined_with(name)
        counts = [self._rows_of(part) for part in names] if len(names) > 1 else [count]
        first = sum(counts[: names.index(name)])
        whole = _read(self._constants.floats(name, sum(counts))).view(np.float32)
        return whole[first : first + count]

    def ids(self, name: str) -> NDArray[np.int64]:
        return _read(self._constants.ids(name)).view(np.int64)

    def matrix(self, name: str) -> NDArray[np.float32]:
        """float32 [rows, columns]: as it is, or of codes and scales."""
        part, names = self._constants.matrix(name), self._constants.joined_with(name)
        if len(names) == 1:
            return _dequantized(part, high_first=name == _EMBEDDING)
        rows, at = [self._rows_of(one) for one in names], names.index(name)
        own = _dequantized(part.slice(sum(rows[:at]), rows[at]), high_first=False)
        if not name.endswith(".lora_b.weight"):
            return own
        before = sum(self._rank_of(one) for one in self._constants.before_on_diagonal(name))
        return own[:, before : before + self._rank_of(name)]

    def rows(self, name: str) -> int:
        """How many rows a matrix has."""
        return self._constants.matrix(name).rows

    def rows_differ(self, constants: Sequence[Constant]) -> NDArray[np.bool_]:
        """Which rows of a matrix of the same scheme have other bytes, bool [rows]. constants: its codes and scales."""
        part = self._constants.matrix(constants[0].name.removesuffix(CODES))
        differ = np.zeros(part.rows, bool)
        for source, other in zip((part.codes, part.scales), constants, strict=False):
            ours, theirs = (data.reshape(part.rows, -1) for data in (_read(source), other.data))
            differ |= (ours != theirs).any(axis=1)
        return differ

    def linear(self, path: str) -> NDArray[np.float32]:
        """What a linear of a foundation computes with, its correction included: float32 [rows, columns]."""
        weight = self.matrix(f"{path}.weight")
        if not path.startswith("layers."):
            return weight
        _, layer, linear = path.split(".", 2)
        back = f"layers.{layer}.{self._back(linear)}"
        if not self.has(back):
            return weight
        return weight + self.matrix(back) @ self.matrix(
            f"layers.{layer}.{self._places[linear]}.directions.weight"
        )

    def _back(self, linear: str) -> str:
        """The name, in a layer, of what adds a linear's correction."""
        return f"{self._places[linear]}.{linear.rpartition('.')[2]}.weight"

    def _rows_of(self, name: str) -> int:
        if name.endswith(".lora_a.weight"):
            return self._rank_of(name)
        _, _, rest = name.split(".", 2)
        for linear, rows in self._rows.items():
            if rest.startswith(f"{linear}."):
                return rows
        # The matrices of a correction, which stand under its place.
        return next(rows for linear, rows in self._rows.items() if rest == self._back(linear))

    def _rank_of(self, name: str) -> int:
        linear = name.split(".", 2)[2].rpartition(".lora_")[0]
        if linear not in self._ranks:
            what = f"constant {name}: the adapter has no branch there"
            raise BundleError(what, where=self._constants.path, hint="add the adapter again")
        return self._ranks[linear]


def _dequantized(part: Part, *, high_first: bool) -> NDArray[np.float32]:
    """high_first: of two 4-bit codes in a byte, as an embedding has them."""
    data = _read(part.codes)
    if part.bits == 32:
        return data.view(np.float32).reshape(part.rows, part.columns)
    if part.bits == 4:
        pair = (data >> np.uint8(4), data & np.uint8(15))
        codes = np.stack(pair if high_first else pair[::-1], axis=-1).view(np.int8) - np.int8(8)
    else:
        codes = data.view(np.int8)
    scales = _scales(part)
    values = codes.reshape(part.rows, scales.shape[1], -1) * scales[:, :, None]
    return values.reshape(part.rows, part.columns)


def _scales(part: Part) -> NDArray[np.float32]:
    """float32 [rows, groups]."""
    data, groups = _read(part.scales), part.columns // part.group if part.group else 1
    if len(data) == 4 * part.rows * groups:
        return data.view(np.float32).reshape(part.rows, groups)
    wide = data.view(np.uint16).astype(np.uint32) << np.uint32(16)  # bfloat16 is the upper half of a float32
    return wide.view(np.float32).reshape(part.rows, groups)


def _read(source: Source) -> NDArray[np.uint8]:
    data = bytearray(source.size)
    done = 0
    while done < source.size:
        got = os.preadv(source.file, [memoryview(data)[done:]], source.offset + done)
        if got == 0:
            raise BundleError("a data file ends early", hint="bedplate verify BUNDLE checks every file")
        done += got
    return np.frombuffer(data, np.uint8)
