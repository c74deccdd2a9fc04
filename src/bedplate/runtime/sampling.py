"""Choosing the next token from logits.

numpy is imported where tokens are drawn: whoever takes the likeliest starts sooner and smaller without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bedplate.errors import RunError
from bedplate.runtime import arguments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bedplate import _native


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 0 chooses the most likely token.  top_p: 1 keeps all tokens.  top_k: 0 keeps all tokens.

    RunError: one of them is not a number, or out of range.
    """

    temperature: float
    top_p: float
    top_k: int

    def __post_init__(self) -> None:
        hint = "give 0 for the most likely token, or a larger number; 0.7 is usual"
        if arguments.real("temperature", self.temperature, hint) < 0:
            raise RunError(f"temperature is {self.temperature}", hint=hint)
        hint = "give a number above 0 and at most 1; 1 keeps every token"
        if not 0 < arguments.real("top_p", self.top_p, hint) <= 1:
            raise RunError(f"top_p is {self.top_p}", hint=hint)
        arguments.integer("top_k", self.top_k, least=0)


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """What a token is drawn from, float64 [vocab], for temperature > 0.

    top_k keeps the k likeliest tokens; of those, top_p the fewest that together reach p (nucleus sampling,
    Holtzman et al. 2020). Equal logits are kept or left out by their ids, lower first.
    """
    import numpy as np

    scaled = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # near temperature 0, -inf stands for what is never drawn
        scaled = (scaled - scaled.max()) / float(sampling.temperature)
    weights = np.exp(scaled)
    keep = sampling.top_k or weights.size
    if keep < weights.size or sampling.top_p < 1:
        order = np.argsort(-logits, kind="stable")[:keep]  # scaling may make equal what is not
        ranked = weights[order] / weights[order].sum()
        before = np.cumsum(ranked) - ranked  # what the likelier tokens hold already
        kept = np.zeros_like(weights)
        order = order[before < sampling.top_p]
        kept[order] = weights[order]
        weights = kept
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


def draw(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """A token's id, for temperature > 0. logits: float32 [vocab]. RunError: they hold NaN."""
    import numpy as np

    if np.isnan(logits.max()):
        raise _not_numbers()
    cumulative = np.cumsum(probabilities(logits, sampling))
    # Scaled to the last sum, which rounding leaves beside 1: a draw never falls beyond the last kept token.
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))


def chooser(sampling: Sampling, seed: int) -> Callable[[_native.Logits], int]:
    """Chooses one token's id after the other, from the logits of their last row. RunError: those hold NaN."""
    if sampling.temperature == 0:
        return _likeliest
    import numpy as np

    random = np.random.default_rng(seed)
    return lambda logits: draw(logits.array[-1], sampling, random)


def _likeliest(logits: _native.Logits) -> int:
    token = logits.likeliest()
    if token is None:
        raise _not_numbers()
    return token


def _not_numbers() -> RunError:
    return RunError("the model's logits are not numbers", hint="bedplate verify BUNDLE finds damaged files")
