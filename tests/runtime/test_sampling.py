from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bedplate.errors import RunError
from bedplate.runtime.sampling import Sampling, chooser, draw, probabilities

LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 50),
)


@dataclass
class Given:
    """Logits, as a step of the native layer gives them."""

    array: NDArray[np.float32]

    def likeliest(self) -> int | None:
        row = self.array[-1]
        return None if np.isnan(row).any() else int(row.argmax())


@given(logits=LOGITS, sampling=SAMPLINGS)
@example(  # less the largest, two of them are equal
    logits=np.array([-5e-40, 0, 0.5], np.float32), sampling=Sampling(temperature=1, top_p=0.5, top_k=0)
)
def test_probabilities_are_the_softmax_of_what_is_kept(
    logits: NDArray[np.float32], sampling: Sampling
) -> None:
    chances = probabilities(logits, sampling)
    assert chances.sum() == pytest.approx(1)
    kept = chances > 0
    assert not sampling.top_k or kept.sum() <= sampling.top_k
    plain = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    np.testing.assert_allclose(chances[kept], plain[kept] / plain[kept].sum(), rtol=1e-9)
    assert kept[int(logits.argmax())]
    if (~kept).any():
        assert logits[kept].min() >= logits[~kept & (plain > 0)].max(initial=-np.inf)


@given(logits=LOGITS, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits: NDArray[np.float32], top_p: float) -> None:
    everything = probabilities(logits, Sampling(temperature=1, top_p=1, top_k=0))
    kept = probabilities(logits, Sampling(temperature=1, top_p=top_p, top_k=0)) > 0
    assert everything[kept].sum() >= top_p - 1e-9
    assert everything[kept].sum() - everything[kept].min() < top_p + 1e-9


@given(logits=LOGITS, sampling=SAMPLINGS, seed=st.integers(0, 100))
def test_a_seed_decides_and_only_kept_tokens_are_drawn(
    logits: NDArray[np.float32], sampling: Sampling, seed: int
) -> None:
    draws = [draw(logits, sampling, np.random.default_rng(seed)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert probabilities(logits, sampling)[draws[0]] > 0


@given(logits=LOGITS)
def test_greedy_takes_the_likeliest(logits: NDArray[np.float32]) -> None:
    greedy = Sampling(temperature=0, top_p=1, top_k=0)
    assert chooser(greedy, 0)(Given(logits[None])) == logits.argmax()


@given(logits=LOGITS, sampling=SAMPLINGS, seed=st.integers(0, 100))
def test_a_chooser_draws_from_the_last_row(
    logits: NDArray[np.float32], sampling: Sampling, seed: int
) -> None:
    rows = Given(np.stack((logits[::-1], logits)))
    assert chooser(sampling, seed)(rows) == draw(logits, sampling, np.random.default_rng(seed))


def test_draws_follow_the_probabilities() -> None:
    logits, random = np.log(np.array([0.6, 0.3, 0.1], np.float32)), np.random.default_rng(0)
    sampling = Sampling(temperature=1, top_p=1, top_k=0)
    counts = np.bincount([draw(logits, sampling, random) for _ in range(4000)])
    np.testing.assert_allclose(counts / 4000, [0.6, 0.3, 0.1], atol=0.03)


def test_next_to_temperature_0_the_likeliest_is_drawn() -> None:
    logits, sampling = np.array([0, 50, 49.9], np.float32), Sampling(temperature=5e-324, top_p=1, top_k=0)
    assert probabilities(logits, sampling).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    choose = chooser(Sampling(temperature=temperature, top_p=1, top_k=0), 0)
    with pytest.raises(RunError, match="not numbers"):
        choose(Given(np.array([[1, np.nan]], np.float32)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), 10**400, "1", True, None, 1j)),
        *(("top_p", value) for value in (0, 1.1, float("nan"), "1", True, None)),
        *(("top_k", value) for value in (-1, 2.5, 2.0, "1", True, None)),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(RunError, match=rf"{field} is .*\nhint: "):
        Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, field: value})
