"""Whether an adapter has an effect: compares its logits with those of the base on the same text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bedplate.bundle.named import NamedConstants
from bedplate.bundle.store import AdapterEntry, Bundle
from bedplate.runtime.loading import load_adapter
from bedplate.runtime.weights import Weights
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
    whose most likely token is another one. max_difference: the largest difference of a logit. further_tokens: how
    many the adapter has that the base has not. All else leaves these out.
    """

    name: str
    positions: int
    mean_kl: float
    top1_changed: float
    max_difference: float
    further_tokens: int

    @property
    def took_effect(self) -> bool:
        return self.max_difference > 0.0 or self.further_tokens > 0


def texts_of_effects(engine: Engine) -> dict[str | None, tuple[int, ...]]:
    """The text that shows the effect of each adapter, by its name; of the base (None), that of most of them.

    It is the fixed text in the tokens of the base, as far as it fits; first, tokens that adapters have rows of. Of an
    activated LoRA, it begins with the invocation.
    """
    rows = [
        token
        for entry in engine.bundle.adapters.values()
        for token in _own_tokens(entry, engine.limits.vocab)
    ]
    text = engine.tokenizer.encode(_TEXT)
    of_base, most = [*rows[:_FEW], *text][:64], engine.limits.max_context
    texts: dict[str | None, tuple[int, ...]] = {None: tuple(of_base[:most])}
    for name, entry in engine.bundle.adapters.items():
        texts[name] = (*(entry.read_info().invocation or ()), *of_base)[:most]
    return texts


def _own_tokens(entry: AdapterEntry, vocab: int) -> list[int]:
    """Some of the tokens that only the embedding has other rows of. vocab: of the base."""
    info, name = entry.read_info(), "embed_tokens.rows.ids"
    if not any(constant.name == name for constant in info.constants):
        return []
    with NamedConstants(entry.weights, info.constants) as constants:
        source = constants.ids(name)
        ids = np.frombuffer(os.pread(source.file, 8 * _FEW, source.offset), np.int64)
    return [int(token) for token in ids[: source.size // 8] if token < vocab]


def without_effect(base: Weights, bundle: Bundle, spec: ModelSpec) -> list[str]:
    """The adapters that change no bit of the logits after a few tokens, of which an invocation comes first.

    BundleError: an adapter's file is damaged.
    """
    return [
        name
        for name, entry in bundle.adapters.items()
        if not has_effect(base, load_adapter(base, bundle, name, spec), entry, spec)
    ]


def has_effect(base: Weights, adapted: Weights, entry: AdapterEntry, spec: ModelSpec) -> bool:
    """Whether an adapter changes some bit of the logits after a few tokens, of which an invocation comes first."""
    # With one token alone, q and k would change nothing.
    few = [spec.vocab_size * number // _FEW for number in range(_FEW)]
    first = adapted.invocation or _own_tokens(entry, spec.vocab_size)
    ids = [*first, *few][: spec.max_positions]
    return not np.array_equal(_last_logits(adapted.for_text(ids), ids), _last_logits(base, ids))


def _last_logits(weights: Weights, ids: list[int]) -> NDArray[np.float32]:
    kv, last = weights.new_kv(weights.is_long(len(ids))), len(ids) - 1
    rows = [(token, at, kv, *weights.at(at), at == last) for at, token in enumerate(ids)]
    return weights.decoder.step(rows).array


def compare(name: str, base: NDArray[np.float32], adapted: NDArray[np.float32]) -> Effect:
    """The effect of an adapter, from logits float32 [T, vocab] of the base and of the adapter."""
    further = adapted.shape[1] - base.shape[1]
    adapted = adapted[:, : base.shape[1]]
    log_p, log_q = log_softmax(adapted), log_softmax(base)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return Effect(
        name=name,
        positions=len(base),
        mean_kl=float(kl.mean()),
        top1_changed=float((base.argmax(axis=1) != adapted.argmax(axis=1)).mean()),
        max_difference=float(np.abs(base - adapted).max()),
        further_tokens=further,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the softmax of each row, [rows, vocab]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]
