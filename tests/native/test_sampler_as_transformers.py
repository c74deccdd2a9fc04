"""The settings of the sampler mean what they mean in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sampling_formula import native_sampler
from test_logits import logits_of
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PROMPT = [3, 3, 7, 250]
# The setting here, and theirs. This is the order in which their `generate` applies them.
PROCESSORS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "bias": (
        {"bias": [(3, 2.5), (9, -4.0)]},
        lambda: SequenceBiasLogitsProcessor([[[3], 2.5], [[9], -4.0]]),
    ),
    "repetition": (
        {"repetition": 1.3, "prompt": PROMPT},
        lambda: RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "temperature": ({"temperature": 0.6}, lambda: TemperatureLogitsWarper(0.6)),
    "top_k": ({"top_k": 40}, lambda: TopKLogitsWarper(40)),
    "top_p": ({"top_p": 0.8}, lambda: TopPLogitsWarper(0.8)),
    "min_p": ({"min_p": 0.03}, lambda: MinPLogitsWarper(0.03)),
}


def theirs(logits: NDArray[np.float32], names: list[str]) -> NDArray[np.float32]:
    scores, ids = torch.from_numpy(logits)[None], torch.tensor([PROMPT])
    for name in names:
        scores = PROCESSORS[name][1]()(ids, scores)
    chances: NDArray[np.float32] = scores.softmax(-1)[0].numpy()
    return chances


@pytest.mark.parametrize("names", [[name] for name in PROCESSORS] + [list(PROCESSORS)], ids="-".join)
def test_chances_are_theirs(names: list[str]) -> None:
    drawn = np.random.default_rng(5)
    for scale in (0.5, 2, 5):
        logits = logits_of(drawn.normal(size=280).astype(np.float32) * scale, [0])
        rules = {key: value for name in names for key, value in PROCESSORS[name][0].items()}
        found = np.array(native_sampler(**rules).chances(logits))
        expected = theirs(logits.array[0].copy(), names)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
