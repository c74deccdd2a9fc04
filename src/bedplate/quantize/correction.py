"""Linears of one input → their quantized weights, and the correction that gives back what those lost.

W x ≈ Q x + B D x: Q has 4 bits. D, the directions, is shared by the linears: first a row of ones for each group of
columns, whose B are the groups' offsets; then `recovery_rank` rows for what is still amiss, the largest singular
directions of the error as the activations see it (LQER: its columns scaled by the root mean square of the inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bedplate.quantize.plan import correction_scheme
from bedplate.quantize.recipe import WEIGHT_ONLY, Scheme
from bedplate.quantize.weights import QuantizedWeight, quantize_weight, quantize_with_offsets

_OVERSAMPLING, _ITERATIONS = 8, 4  # of the randomized SVD (Halko et al., algorithm 4.4)
_ROUNDS = 3  # of quantizing what the directions leave, and finding directions for what that leaves (LoftQ)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrected:
    """weights: of the linears, by name. directions: D. backs: B of each linear, by name."""

    weights: Mapping[str, QuantizedWeight]
    directions: QuantizedWeight
    backs: Mapping[str, QuantizedWeight]

    def dequantize(self) -> dict[str, Tensor]:
        """What a linear and its correction compute with together, float32 [rows, columns], by name."""
        directions = self.directions.dequantize()
        return {
            name: weight.dequantize() + self.backs[name].dequantize() @ directions
            for name, weight in self.weights.items()
        }


def quantize_corrected(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], *, rank: int, rms: Tensor | None
) -> Corrected:
    """Quantize linears of one input, [rows, columns] each, with a correction of `rank` directions in all.

    rms: root mean square of the input's columns, float32 [columns]; None: directions beyond the offsets stay zero.
    A linear whose scheme has not 4 bits gets a correction of zeros; one of floats is none of the `weights` that are
    returned. Raises RecipeError.
    """
    quantized, offsets = _quantize(weights, schemes, rms)
    corrected = _correct(weights, schemes, quantized, offsets, rank, rms)
    if rms is None or rank == _groups(offsets):
        return corrected
    for _ in range(_ROUNDS - 1):
        targets = {name: weights[name].float() - given for name, given in _recovered(corrected, offsets)}
        quantized, offsets = _quantize(targets, schemes, rms)
        corrected = _correct(weights, schemes, quantized, offsets, rank, rms)
    return corrected


def _quantize(
    targets: Mapping[str, Tensor], schemes: Mapping[str, Scheme], rms: Tensor | None
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Quantized weights by name, and offsets of those that have some; nothing for a scheme of floats."""
    quantized: dict[str, QuantizedWeight] = {}
    offsets: dict[str, Tensor] = {}
    for name, target in targets.items():
        scheme = schemes[name]
        if scheme.method == "offset" and scheme.bits == 4:
            importance = None if rms is None else rms.square()
            group_size = scheme.group_size or target.shape[1]
            quantized[name], offsets[name] = quantize_with_offsets(target, group_size, importance)
        elif scheme.bits is not None:
            quantized[name] = quantize_weight(target, scheme)
    return quantized, offsets


def _correct(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    quantized: Mapping[str, QuantizedWeight],
    offsets: Mapping[str, Tensor],
    rank: int,
    rms: Tensor | None,
) -> Corrected:
    columns = next(iter(weights.values())).shape[1]
    groups = _groups(offsets)
    ones = (
        torch.eye(groups).repeat_interleave(columns // groups, dim=1) if groups else torch.empty(0, columns)
    )
    learned = rank - groups if rms is not None else 0
    errors = {
        name: weights[name].float() - quantized[name].dequantize() - _spread(offsets.get(name), columns)
        for name in weights
        if learned and schemes[name].bits == 4
    }
    found = torch.zeros(rank - groups, columns)
    if errors and rms is not None:
        group_size = max(columns // max(groups, 1), 1)
        found = _directions(torch.cat(list(errors.values())), rms, len(found), group_size)
    directions = quantize_weight(torch.cat((ones, found)), correction_scheme("directions", columns))
    stored = directions.dequantize()
    backs = {
        name: quantize_weight(
            _backs(stored, offsets.get(name), errors.get(name), groups, rms, len(weight)), WEIGHT_ONLY
        )
        for name, weight in weights.items()
    }
    return Corrected(weights=quantized, directions=directions, backs=backs)


def _recovered(corrected: Corrected, offsets: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What the directions beyond the offsets give back, float32 [rows, columns] of each linear."""
    groups = _groups(offsets)
    directions = corrected.directions.dequantize()[groups:]
    for name, back in corrected.backs.items():
        yield name, back.dequantize()[:, groups:] @ directions


def _groups(offsets: Mapping[str, Tensor]) -> int:
    return next((offset.shape[1] for offset in offsets.values()), 0)


def _spread(offsets: Tensor | None, columns: int) -> Tensor | float:
    return 0.0 if offsets is None else offsets.repeat_interleave(columns // offsets.shape[1], dim=1)


def _directions(error: Tensor, rms: Tensor, count: int, group_size: int) -> Tensor:
    """The leading right singular vectors of error · diag(rms), seen from the input: float32 [count, columns].

    Scaled so that what comes out of them is about as large as a sum over a group of the input's columns.
    """
    scale = rms.clamp_min(rms.mean() * 1e-3)
    seen = error * scale
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(seen.shape[1], min(count + _OVERSAMPLING, *seen.shape), generator=generator)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(seen.T @ (seen @ basis)).Q
    _, _, right = torch.linalg.svd(seen @ basis, full_matrices=False)
    vectors = (basis @ right.T).T[:count]
    if len(vectors) < count:
        vectors = torch.cat((vectors, torch.zeros(count - len(vectors), vectors.shape[1])))
    scaled: Tensor = vectors / scale * (group_size**0.5 * scale.mean())
    return scaled


def _backs(
    directions: Tensor,
    offsets: Tensor | None,
    error: Tensor | None,
    groups: int,
    rms: Tensor | None,
    rows: int,
) -> Tensor:
    """B float32 [rows, rank] for the directions as they are stored."""
    back = torch.zeros(rows, len(directions))
    if offsets is not None:
        ones, size = directions[:groups], directions.shape[1] // groups
        back[:, :groups] = offsets / torch.stack([ones[i, i * size] for i in range(groups)])
    if error is not None and rms is not None and len(directions) > groups:
        found = (directions[groups:] * rms).double()
        gram = found @ found.T
        gram += torch.eye(len(gram), dtype=torch.float64) * gram.diagonal().mean().clamp_min(1e-30) * 1e-6
        back[:, groups:] = torch.linalg.solve(gram, found @ (error * rms).double().T).T.float()
    return back
