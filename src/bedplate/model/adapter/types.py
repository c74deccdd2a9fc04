"""What a reader of one format returns (`RawAdapter`), and what the rest of bedplate uses (`Adapter`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError

AGAIN = "copy or save the adapter again"

# A linear of a layer: (2, "self_attn.q_proj").
Place = tuple[int, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraPair:
    """What is added to one linear: y += scale · B (A x).

    a: float32 [rank, in]. b: float32 [out, rank]. Ranks may differ from linear to linear.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RawAdapter:
    """An adapter as its files have it, not yet compared with a model.

    format: `peft`, …, as a user knows it.
    weights: the file that holds the tensors; errors about them name it.
    pairs: by linear. A linear that is not here is not adapted.
    alpha: lora_alpha, to be shown; the factor that counts is each pair's own.
    fingerprint: SHA-256 over all files that were read.
    warnings: what a user must know though the adapter is taken.
    """

    path: Path
    format: str
    weights: Path
    pairs: Mapping[Place, LoraPair]
    alpha: float
    fingerprint: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter that fits a model.

    ranks: rank of each adapted linear, by its name in a layer (`self_attn.q_proj`): the largest of its layers.
    shapes: (rows, columns) of each adapted linear.
    fingerprint, warnings: see RawAdapter.
    """

    path: Path
    format: str
    alpha: float
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    n_layers: int
    fingerprint: str
    warnings: tuple[str, ...]
    _pairs: Mapping[Place, LoraPair]

    @property
    def rank(self) -> int:
        """The largest rank of all linears."""
        return max(self.ranks.values())

    def matrices(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """(module path, A float32 [rank, in], B float32 [out, rank] with the scale folded in), by layer.

        rank is that of `ranks`: what has a lower one, or is not adapted at all, is filled up with zeros.
        """
        for layer in range(self.n_layers):
            for linear, rank in self.ranks.items():
                rows, columns = self.shapes[linear]
                a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
                if pair := self._pairs.get((layer, linear)):
                    own = len(pair.a)
                    a[:own], b[:, :own] = pair.a, folded_b(pair)
                yield f"layers.{layer}.{linear}", a, b

    def check_range(self, where: Path) -> None:
        """AdapterError: the scale times B is beyond float32 somewhere."""
        for (layer, linear), pair in self._pairs.items():
            if not np.isfinite(folded_b(pair)).all():
                raise AdapterError(
                    f"the scale {pair.scale:g} times lora_B of layers.{layer}.{linear} is too large for float32",
                    where=where,
                    hint=AGAIN,
                )


def folded_b(pair: LoraPair) -> NDArray[np.float32]:
    """B with the scale in it, float32 [out, rank]; infinite or NaN where it is beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return pair.b * np.float32(pair.scale)
