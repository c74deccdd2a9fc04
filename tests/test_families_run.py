"""Bundles of every family: they compute what transformers does, or `build` refuses the model by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import LENGTH, make_toy, save_toy, theirs, variants
from toy import save_toy_tokenizer

import bedplate
from bedplate.errors import UnsupportedError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.runtime.weights import check_native

VOCABULARY = 320
TOKENS = [
    int(token)
    for token in torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
]


@pytest.mark.parametrize("variant", variants(), ids="-".join)
def test_a_bundle_computes_what_transformers_does(variant: tuple[str, str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_toy(model, make_toy(*variant, vocab_size=VOCABULARY))
    save_toy_tokenizer(model, VOCABULARY)
    try:
        check_native(open_checkpoint(model).spec, model)
    except UnsupportedError as error:
        with pytest.raises(UnsupportedError, match="does not compute this model") as caught:
            bedplate.build(model, tmp_path / "toy.bundle", programs=False)
        assert str(caught.value) == str(error) and not (tmp_path / "toy.bundle").exists()
        return
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    expected = theirs(model, TOKENS).numpy()
    with bedplate.Engine(bundle, kv="float32") as engine:
        session = engine.session()
        # Sums of the same terms in another order; the largest logits are about 10.
        np.testing.assert_allclose(session.step(TOKENS[:10]), expected[9], rtol=0, atol=1e-4)
        for position in range(10, LENGTH):
            found = session.step([TOKENS[position]])
            np.testing.assert_allclose(found, expected[position], rtol=0, atol=1e-4)
