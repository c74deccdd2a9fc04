"""Bundles of every family: they compute what transformers does, or `build` refuses the model by name."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import LENGTH, TOYS, make_toy, save_toy, theirs, variants
from toy import save_toy_tokenizer

import bedplate
from bedplate.errors import UnsupportedError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.config import spec_from_config
from bedplate.model.families import glm4
from bedplate.oracle import stock_program
from bedplate.runtime.weights import check_native
from bedplate.spec import ModelSpec

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
ROW = re.compile(
    r"^\| `(?P<family>\w+)` \| [^|]+ \| (?P<run>all|some|none) \| (?P<fields>[^|]+) \|$", re.MULTILINE
)
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", [("qwen2", "a window that is off"), ("phi3", "partial")], ids="-".join)
def test_a_program_computes_what_transformers_does(
    variant: tuple[str, str], unit_cache: Path, tmp_path: Path
) -> None:
    """Of structures that no Llama has: biases of q, k and v alone, and pairs that do not turn."""
    model = tmp_path / "model"
    save_toy(model, make_toy(*variant, vocab_size=VOCABULARY))
    save_toy_tokenizer(model, VOCABULARY)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize="none", unit_cache=unit_cache)
    found = stock_program(bundle).logits(TOKENS)
    np.testing.assert_allclose(found, theirs(model, TOKENS).numpy(), rtol=0, atol=1e-4)


def refused_for(spec: ModelSpec) -> set[str]:
    """The fields of a description that the runtime does not compute."""
    plain = {
        "norm": "rms",
        "norms": ("attention_norm", "mlp_norm"),
        "parallel": False,
        "qk_norm": None,
        "activation": "silu",
        "gated": True,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "attention_scale": spec.head_dim**-0.5,
        "logit_scale": 1.0,
        "score_cap": None,
        "logit_cap": None,
        "query_growth": None,
        "layers": tuple(replace(layer, rope=0, window=None) for layer in spec.layers),
        "ropes": tuple(replace(table, scale=1.0, long=None) for table in spec.ropes),
    }
    found: set[str] = set()
    while True:
        try:
            check_native(spec, DOCS)
        except UnsupportedError as error:
            named = re.search(r"another '(\w+)'", error.what)
            assert named and named[1] not in found, error.what
            found.add(named[1])
            spec = replace(spec, **{named[1]: plain[named[1]]})
        else:
            return found


def test_the_table_in_the_docs_says_what_runs() -> None:
    rows = {row["family"]: (row["run"], row["fields"]) for row in ROW.finditer(DOCS.read_text("utf-8"))}
    found = {}
    for family in TOYS:
        refusals = [
            refused_for(spec_from_config(make_toy(*variant).to_dict(), where=family))
            for variant in variants()
            if variant[0] == family
        ]
        run = "none" if all(refusals) else "some" if any(refusals) else "all"
        fields = ", ".join(f"`{name}`" for name in sorted(set().union(*refusals)))
        found[family] = (run, fields or "–")
    assert rows == found


def test_the_example_in_the_docs_is_the_file() -> None:
    assert f"```python\n{inspect.getsource(glm4)}```" in DOCS.read_text("utf-8")
