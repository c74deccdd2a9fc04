"""The quantized path against the eager quantized model, teacher-forced over a page of prose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from eager import eager_decoder, eager_logits
from grouped import grouped

from bedplate import Bundle, Engine
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.load import float_decoder
from bedplate.oracle import stock_program
from bedplate.quantize.eager import quantize_decoder
from bedplate.quantize.recipe import make_recipe

pytestmark = pytest.mark.real_model


def nll(logits: torch.Tensor, tokens: list[int]) -> float:
    """Mean negative log-likelihood of each token given those before it, nats."""
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of `other`'s next-token distribution from `reference`'s, nats."""
    log_p, log_q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture(scope="module")
def of_floats(smollm2: Path, prose: list[int]) -> torch.Tensor:
    """Logits [T, V] of the float model."""
    return eager_logits(float_decoder(open_checkpoint(smollm2), max_context=1024), prose)


@pytest.fixture(scope="module")
def activation_kl(smollm2: Path, prose: list[int], of_floats: torch.Tensor) -> float:
    """What 8-bit activations alone do: 8da8w against float (8-bit weights cost next to nothing)."""
    decoder = float_decoder(open_checkpoint(smollm2), max_context=1024)
    return mean_kl(of_floats, eager_logits(quantize_decoder(decoder, make_recipe("8da8w")), prose))


@pytest.mark.parametrize("name", [None, "extract", "extract8"])
def test_whole_model_stays_with_the_eager_quantized_model(
    name: str | None,
    quantized_bundle: Bundle,
    smollm2: Path,
    adapters: dict[str, Path],
    prose: list[int],
    activation_kl: float,
) -> None:
    """With that whose inputs are quantized as ours are, and with the stock program, whose inputs are a row at once."""
    adapter = None if name is None else adapters[name.removesuffix("8")]
    quantize = "8w" if name == "extract8" else "none"
    eager = eager_decoder(smollm2, quantized_bundle, adapter, quantize)
    as_stock = eager_logits(eager, prose)
    expected = eager_logits(grouped(eager), prose)
    with Engine(quantized_bundle) as engine:
        logits = torch.from_numpy(np.array(engine.session(name).logits(prose)))
    stock = torch.from_numpy(stock_program(quantized_bundle, name or "base").logits(prose))
    assert len(prose) >= 500
    assert nll(logits, prose) == pytest.approx(nll(expected, prose), rel=0.005)
    assert mean_kl(expected, logits) <= 0.5 * activation_kl
    assert nll(stock, prose) == pytest.approx(nll(as_stock, prose), rel=0.01)
    assert mean_kl(as_stock, stock) <= 1.5 * activation_kl
    assert nll(logits, prose) == pytest.approx(nll(stock, prose), rel=0.02)
    assert mean_kl(logits, stock) <= 2 * activation_kl


def test_it_is_nearer_to_the_float_model_than_the_stock_program(
    quantized_bundle: Bundle, prose: list[int], of_floats: torch.Tensor
) -> None:
    with Engine(quantized_bundle) as engine:
        logits = torch.from_numpy(np.array(engine.session().logits(prose)))
    stock = torch.from_numpy(stock_program(quantized_bundle).logits(prose))
    assert mean_kl(of_floats, logits) < 0.7 * mean_kl(of_floats, stock)
