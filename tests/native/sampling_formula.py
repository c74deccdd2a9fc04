"""What a token is drawn from, as plain numpy says it: the formula that the native sampler is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate import _native


def native_sampler(**rules: Any) -> _native.Sampler:
    """With the settings that change nothing, but for those that are given."""
    plain: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition": 1.0,
        "presence": 0.0,
        "frequency": 0.0,
        "bias": [],
        "banned": [],
        "ends": [],
        "min_tokens": 0,
        "seed": 0,
        "prompt": [],
    }
    return _native.Sampler(**{**plain, **rules})


def changed(
    logits: NDArray[np.float32],
    generated: Sequence[int] = (),
    mask: NDArray[np.bool_] | None = None,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: Sequence[tuple[int, float]] = (),
    banned: Sequence[int] = (),
    ends: Sequence[int] = (),
    min_tokens: int = 0,
    prompt: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Logits after bias, penalties and what is never chosen, before temperature."""
    values = logits.astype(np.float64)
    size = len(values)
    for token, more in bias:
        if token < size:
            values[token] += more
    counts = np.bincount(np.array(generated, np.int64), minlength=size)
    seen = counts > 0
    seen[[token for token in prompt if token < size]] = True
    values[seen] = np.where(values > 0, values / repetition, values * repetition)[seen]
    values -= frequency * counts + presence * (counts > 0)
    values[[token for token in banned if token < size]] = -np.inf
    if len(generated) < min_tokens:
        values[[token for token in ends if token < size]] = -np.inf
    if mask is not None:
        allowed = np.zeros(size, bool)
        allowed[: len(mask)] = mask[:size]
        values[~allowed] = -np.inf
    return values.astype(np.float32)


def chances(
    logits: NDArray[np.float32],
    generated: Sequence[int] = (),
    mask: NDArray[np.bool_] | None = None,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    slack: float = 0.0,
    **changes: Any,
) -> NDArray[np.float64]:
    """Of each token; all 0 if none is allowed. slack: of the bounds of top_p and min_p."""
    values = changed(logits, generated, mask, **changes)
    if values.max() == -np.inf:
        return np.zeros(len(values))
    scaled = values.astype(np.float64)
    weights = np.exp((scaled - scaled.max()) / temperature)
    weights[weights < 2.0**-126] = 0
    order = np.argsort(-values, kind="stable")[: top_k or None]
    ranked = weights[order] / weights[order].sum()
    before = np.cumsum(ranked) - ranked
    inside = np.ones(len(order), bool) if top_p == 1 else before < top_p + slack
    inside &= ranked >= ranked[0] * min_p * (1 - slack)
    inside[0] = True
    kept = np.zeros_like(weights)
    kept[order[inside]] = weights[order[inside]]
    return kept / kept.sum()
