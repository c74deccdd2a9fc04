"""Whether an adapter has an effect: compares its logits with those of the base on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bedplate.bundle.store import Bundle
from bedplate.runtime.weights import Weights, load_adapter
from bedplate.spec import ModelSpec

if TYPE_CHECKING:
    from bedplate.runtime.engine import Engine

_FEW = 8
# Any text works: an adapter that changes nothing here has a B of zeros.
_TEXT = (
    "The weather was fine, so we walked to the market and bought bread, apples and a small bunch of flowers. "
    "On the way back I asked her what she thought of the plan, and she said: it depends on the price."
)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an adapter changes over `positions` positions of a fixed text.

    mean_kl: KL divergence of its next-token distribution from the base's, nats. top1_changed: share of positions
    whose most likely token is another one. max_difference: the largest difference of a logit.
    """

    name: str
    positions: int
    mean_kl: float
    top1_changed: float
    max_difference: float

    @property
    def took_effect(self) -> bool:
        return self.max_difference > 0.0


def text_of_effects(engine: Engine) -> list[int]:
    """The fixed text, as far as it fits."""
    return engine.tokenizer.encode(_TEXT)[: min(engine.limits.max_context, 64)]


def measure_effects(
    names: Iterable[str], logits_of: Callable[[str | None], NDArray[np.float32]]
) -> list[Effect]:
    """The effect of each adapter. logits_of: logits float32 [T, vocab] of the text, by name (None: the base)."""
    base = logits_of(None)
    return [compare(name, base, logits_of(name)) for name in names]


def without_effect(base: Weights, bundle: Bundle, spec: ModelSpec) -> list[str]:
    """The adapters that change no bit of the logits after a few tokens. Faster than `measure_effects`.

    BundleError: an adapter's file is damaged.
    """
    # With one token alone, q and k would change nothing.
    ids = [spec.vocab_size * number // _FEW for number in range(min(_FEW, spec.max_positions))]
    expected = _last_logits(base, ids)
    found = ((name, load_adapter(base, bundle, name, spec)) for name in bundle.adapters)
    return [name for name, weights in found if np.array_equal(_last_logits(weights, ids), expected)]


def _last_logits(weights: Weights, ids: list[int]) -> NDArray[np.float32]:
    kv, last = weights.new_kv(weights.is_long(len(ids))), len(ids) - 1
    rows = [(token, at, kv, weights.adapter, 1.0, at == last) for at, token in enumerate(ids)]
    return weights.decoder.step(rows).array


def compare(name: str, base: NDArray[np.float32], adapted: NDArray[np.float32]) -> Effect:
    """The effect of an adapter, from logits float32 [T, vocab] of the base and of the adapter. Tokens that only the
    adapter has are left out.
    """
    adapted = adapted[:, : base.shape[1]]
    log_p, log_q = log_softmax(adapted), log_softmax(base)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return Effect(
        name=name,
        positions=len(base),
        mean_kl=float(kl.mean()),
        top1_changed=float((base.argmax(axis=1) != adapted.argmax(axis=1)).mean()),
        max_difference=float(np.abs(base - adapted).max()),
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the softmax of each row, [rows, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]
