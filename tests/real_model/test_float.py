"""The float path against transformers + PEFT, over a page of prose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bedplate import Bundle, Engine

pytestmark = pytest.mark.real_model
STEPPED = 560  # the tokens before come in one step, those after one by one


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", [None, "extract"])
def test_logits_are_within_a_thousandth_of_transformers_and_peft(
    name: str | None, float_bundle: Bundle, theirs: Any, adapters: dict[str, Path], prose: list[int]
) -> None:
    assert len(prose) >= 500
    model = theirs if name is None else PeftModel.from_pretrained(theirs, adapters[name]).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prose])).logits[0].numpy()
    if name is not None:
        model.unload()  # it stands in the model that all tests share
    with Engine(float_bundle, kv="float32") as engine:
        prefilled = engine.session(name).logits(prose)
        session = engine.session(name)
        session.step(prose[:STEPPED])
        stepped = np.stack([session.step([token]) for token in prose[STEPPED:]])
    assert np.abs(expected).max() > 20
    # The bound that the product promises; measured 6e-5 to 2e-4, float32 sums in another order over 30 layers.
    np.testing.assert_allclose(prefilled, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(stepped, expected[STEPPED:], rtol=0, atol=1e-3)
