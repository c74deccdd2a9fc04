"""What a reader of one format returns (`RawAdapter`), and what the rest of bedplate uses (`Adapter`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError
from bedplate.spec import ModelSpec, linear_shapes

AGAIN = "copy or save the adapter again"
_MOST_IN_A_BRANCH = 1e30  # leaves inputs and sums the last 10^8 of float32's range

# A linear of a layer: (2, "self_attn.q_proj"). Of no layer: (None, "lm_head") and (None, "embed_tokens").
Place = tuple[int | None, str]
EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraPair:
    """What is added to one linear: y = W x + scale · B (A x), and what is done to it.

    a: float32 [rank, in]. b: float32 [out, rank]. Ranks may differ from linear to linear. The embedding is taken for a
        linear that reads which token it is: a [rank, vocab], b [dim, rank].
    magnitude: float32 [out], the length that each row of W + scale · B A is brought to (DoRA). None: it stays.
    bias: float32 [out], added to B (A x) before it is scaled. None: nothing.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float
    magnitude: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of the embedding or the head in place of the base's.

    ids: int64 [n], ascending. values: float32 [n, dim].
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawAdapter:
    """An adapter as its files have it, not yet compared with a model.

    format: `peft`, …, as a user knows it.
    weights: the file that holds the tensors; errors about them name it.
    pairs: by place. What is not here has no branch.
    parameters: new values of parameters, by their names in the model's files (`layers.0.input_layernorm.weight`).
    rows: of `embed_tokens` and `lm_head`.
    layers: the base's layer that each of its layers is. None: it has the base's layers.
    invocation: the tokens that turn an activated LoRA on. None: it is on from the first token of a text.
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
    parameters: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    invocation: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter that fits a model, whose names, rows and order of rows are those of `spec`.

    spec: the base's description, with the adapter's own layers and its own number of tokens.
    layers, invocation: as in RawAdapter.
    ranks: rank of each adapted linear, by its name in a layer (`self_attn.q_proj`): the largest of its layers.
    shapes: (rows, columns) of each adapted linear.
    pairs, parameters, rows, fingerprint, warnings: see RawAdapter.
    """

    path: Path
    format: str
    alpha: float
    spec: ModelSpec
    layers: tuple[int, ...] | None
    invocation: tuple[int, ...] | None
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]
    pairs: Mapping[Place, LoraPair]
    parameters: Mapping[str, NDArray[np.float32]]
    rows: Mapping[str, TokenRows]
    fingerprint: str
    warnings: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank of all branches. 0: it has none."""
        return max((len(pair.a) for pair in self.pairs.values()), default=0)

    def base_layer(self, layer: int) -> int:
        """The base's layer that a layer of the adapter is."""
        return layer if self.layers is None else self.layers[layer]

    def shapes_of(self, linear: str) -> tuple[int, int]:
        """(rows, columns) of a linear of a layer, or of the head."""
        return (self.spec.vocab_size, self.spec.dim) if linear == HEAD else linear_shapes(self.spec)[linear]

    def matrices(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """(module path, A float32 [rank, in], B float32 [out, rank] with the scale folded in), by layer.

        rank is that of `ranks`: what has a lower one, or is not adapted at all, is filled up with zeros.
        """
        for layer in range(self.spec.n_layers):
            for linear, rank in self.ranks.items():
                rows, columns = self.shapes[linear]
                a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
                if pair := self.pairs.get((layer, linear)):
                    own = len(pair.a)
                    a[:own], b[:, :own] = pair.a, folded_b(pair)
                yield f"layers.{layer}.{linear}", a, b

    def check_range(self, where: Path) -> None:
        """AdapterError: the scale times B is beyond float32 somewhere, or what B (A x) can be is close to it.

        There, it depends on the order of operations which values overflow.
        """
        for place, pair in self.pairs.items():
            folded = (folded_b(pair), *(() if pair.bias is None else (folded_bias(pair),)))
            if not all(np.isfinite(part).all() for part in folded):
                raise AdapterError(
                    f"the scale {pair.scale:g} times lora_B of {module_of(place)} is too large for float32",
                    where=where,
                    hint=AGAIN,
                )
            if _greatest(pair) > _MOST_IN_A_BRANCH:
                raise AdapterError(
                    f"lora_A and lora_B of {module_of(place)} are too large for products in float32",
                    where=where,
                    hint=AGAIN,
                )


def _greatest(pair: LoraPair) -> float:
    """No element of B A, with the scale in it, is larger."""
    a, b = np.abs(pair.a).max(axis=1, initial=0), np.abs(folded_b(pair))
    return float((b.astype(np.float64) @ a.astype(np.float64)).max(initial=0))


def module_of(place: Place) -> str:
    """The path of a module: `layers.2.self_attn.q_proj`."""
    layer, linear = place
    return linear if layer is None else f"layers.{layer}.{linear}"


def folded_b(pair: LoraPair) -> NDArray[np.float32]:
    """B with the scale in it, float32 [out, rank]; infinite or NaN where it is beyond float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return pair.b * np.float32(pair.scale)


def folded_bias(pair: LoraPair) -> NDArray[np.float32]:
    """What a branch adds beside B (A x), with the scale in it, float32 [out]."""
    if pair.bias is None:
        return np.zeros(len(pair.b), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return pair.bias * np.float32(pair.scale)
