"""Configs as published models have them: transformers and bedplate read the same file, and compute the same.

tests/data/published.json has them, but narrower and of fewer layers, and windows are a hundredth as wide. What else
decides what a model computes is as it is there: spellings of RoPE, thetas, factors, widths of heads, flags, null,
fields that other software reads, and fields that are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import quiet, save_toy, theirs
from toy import save_toy_tokenizer
from transformers import AutoConfig

import bedplate
from bedplate.model.families import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 320, (64,), generator=torch.Generator().manual_seed(1)).tolist()

# By model_type, and the name of each model.
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "data" / "published.json").read_text()
)
SMALL = {
    **{"num_hidden_layers": 4, "vocab_size": 320, "intermediate_size": 64},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, models in PUBLISHED.items() for name in models]
)
def test_a_published_config_is_what_transformers_makes_of_it(family: str, name: str, tmp_path: Path) -> None:
    model, config = tmp_path / "model", tmp_path / "model" / "config.json"
    model.mkdir()
    text = json.dumps({"model_type": family, **SMALL, **PUBLISHED[family][name]})
    config.write_text(text)
    save_toy(model, quiet(lambda: AutoConfig.from_pretrained(model)), spread=1.6)
    config.write_text(text)  # save_pretrained writes it in its own spelling
    save_toy_tokenizer(model, 320)
    expected, exact = (theirs(model, TOKENS, dtype).numpy() for dtype in (torch.float32, torch.float64))
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    with bedplate.Engine(bundle, kv="float32") as engine:
        found = engine.session().logits(TOKENS)
    # Two calculations in float32 may be as far apart as both lose together, which depends on the processor.
    lost = abs(expected - exact).max()
    assert abs(found - expected).max() < max(1e-4, 4 * lost) and lost < 2e-4


def test_there_are_some_of_every_family() -> None:
    assert sorted(PUBLISHED) == sorted(FAMILIES)
