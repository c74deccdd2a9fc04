"""Bundles of every family: they compute what transformers and PEFT do, or `build` refuses the model by name."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager import eager_decoder, eager_logits
from families import (
    LENGTH,
    TOYS,
    make_toy,
    save_adapter,
    save_toy,
    theirs,
    toy_fields,
    variants,
    with_peft,
)
from peft import LoraConfig
from toy import keys_in_programs, save_toy_tokenizer

import bedplate
from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import read_ptd
from bedplate.errors import UnsupportedError
from bedplate.executorch_1_5 import deserialize_pte_binary
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.config import spec_from_config
from bedplate.model.decoder import Decoder
from bedplate.model.families import FAMILIES, glm4
from bedplate.model.stored import stored_linears
from bedplate.oracle import stock_program
from bedplate.runtime.loading import check_native
from bedplate.spec import LongRope

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
VOCABULARY = 320
TOKENS = [
    int(token)
    for token in torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
]


def save(folder: Path, family: str, variant: str = "first", **changes: Any) -> Path:
    save_toy(folder, make_toy(family, variant, vocab_size=VOCABULARY, **changes))
    save_toy_tokenizer(folder, VOCABULARY)
    return folder


def save_with_adapter(folder: Path, family: str, variant: str = "first", **changes: Any) -> tuple[Path, Path]:
    """A toy of widths that few bits can have, and an adapter of all its linears."""
    widths = {"intermediate_size": 64, "shared_intermediate_size": 64}
    model = save(folder / "model", family, variant, **widths, **changes)
    linears = [name.rpartition(".")[2] for name in stored_linears(open_checkpoint(model).spec)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
    return model, save_adapter(folder / "adapter", model, config)


def few_layers(family: str, variant: str) -> dict[str, Any]:
    """Changes of a toy's config that leave the first layers of it, so many that there is one of each kind."""
    config = json.loads(make_toy(family, variant).to_json_string())
    layers = spec_from_config(config, where=Path(family)).layers
    count = next(n for n in range(1, len(layers) + 1) if set(layers[:n]) == set(layers))
    lists = {
        name: value[:count] for name, value in toy_fields(family, variant).items() if type(value) is list
    }
    return {"num_hidden_layers": count, **lists}


def logits(bundle: bedplate.Bundle, adapter: str | None = None) -> np.ndarray:
    """Of every position of TOKENS, [T, vocab]: ten tokens at once, then one by one."""
    with bedplate.Engine(bundle, kv="float32") as engine:
        session = engine.session(adapter)
        return np.stack(
            [session.step(TOKENS[:10]), *(session.step([token]) for token in TOKENS[10:])], dtype=np.float64
        )


@pytest.mark.parametrize("variant", variants(), ids="-".join)
def test_a_bundle_computes_what_transformers_does(variant: tuple[str, str], tmp_path: Path) -> None:
    model = save(tmp_path / "model", *variant)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    # Sums of the same terms in another order; the largest logits are about 10.
    np.testing.assert_allclose(logits(bundle), expected(model, variant)[9:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("spread", [5.0, 12.0])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_large_weights_lose_no_more_than_in_transformers(family: str, spread: float, tmp_path: Path) -> None:
    """Scores of hundreds make much of how float32 rounds: some logits of Gemma are known to 1e-2 only, whoever
    computes them. What can be asked for is to be as near to the exact ones as transformers is.
    """
    model, text = tmp_path / "model", (TOKENS * 3)[:64]
    config = make_toy(family, vocab_size=VOCABULARY, intermediate_size=4096)  # sums of many terms
    save_toy(model, config, spread=spread)
    save_toy_tokenizer(model, VOCABULARY)
    exact = theirs(model, text, torch.float64).numpy()
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    with bedplate.Engine(bundle, kv="float32") as engine:
        found = engine.session().logits(text)
    ours, transformers = (abs(one - exact).max(axis=1) for one in (found, theirs(model, text).numpy()))
    # Both round as often, in another order: 0.8 to 1.2 was measured. Which has the largest error is chance.
    assert np.median(ours) < 2 * np.median(transformers)


def expected(model: Path, variant: tuple[str, str]) -> np.ndarray:
    """Of transformers: the logits of each position when it is the last one."""
    if "longrope" not in variant[1]:
        return theirs(model, TOKENS).numpy()
    # Here the positions after count too: how long the text is.
    return np.stack([theirs(model, TOKENS[: at + 1]).numpy()[-1] for at in range(LENGTH)])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_text_that_becomes_a_long_one(family: str, tmp_path: Path) -> None:
    """Longrope turns all tokens of a text by other frequencies when it is longer than 16 tokens."""
    variant = family, "longrope, long"
    model = save(tmp_path / "model", *variant)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    whole = theirs(model, TOKENS).numpy()
    last = expected(model, variant)
    assert np.abs(whole[9] - last[9]).max() > 0.1
    with bedplate.Engine(bundle, kv="float32") as engine:
        session, beside = engine.session(), engine.session()
        np.testing.assert_allclose(session.logits(TOKENS), whole, rtol=0, atol=1e-4)
        np.testing.assert_allclose(session.logits(TOKENS[:10]), last[:10], rtol=0, atol=1e-4)
        in_one = session.step(TOKENS[10:])  # over the border
        np.testing.assert_allclose(in_one, last[-1], rtol=0, atol=1e-4)
        beside.step(TOKENS[:16])
        by_one = engine.session()
        rows = [row.copy() for row in (by_one.step(TOKENS[:15]), *(by_one.step([t]) for t in TOKENS[15:]))]
        np.testing.assert_array_equal(rows[-1], in_one)
        # One becomes long in the same step in which another is short.
        short = engine.session()
        both = engine.step([(beside, TOKENS[16:17]), (short, TOKENS[:5])])
        np.testing.assert_array_equal(both[0], rows[2])
        np.testing.assert_allclose(both[1], last[4], rtol=0, atol=1e-4)
        assert beside.tokens == tuple(TOKENS[:17])


def test_no_program_of_long_texts(tmp_path: Path) -> None:
    model, notices = save(tmp_path / "model", "llama", "longrope, long"), Notices()
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize="none", reporter=notices)
    assert bundle.base_program is None
    assert "a text of more than 16 tokens turns by other frequencies" in " ".join(notices.texts)
    with pytest.raises(
        UnsupportedError, match="fixed shapes cannot compute this model: a text of more than 16"
    ):
        bedplate.build(model, tmp_path / "b.bundle", static_shapes=(8, 1))
    with_programs = bedplate.build(
        model, tmp_path / "c.bundle", max_context=16, programs=False, quantize="none"
    )
    assert with_programs.manifest.model["max_context"] == 16


def test_layers_that_differ_in_when_a_text_is_long(tmp_path: Path) -> None:
    spec = open_checkpoint(save(tmp_path, "llama", "longrope, long")).spec
    (table,) = spec.ropes
    other = replace(table, long=LongRope(frequencies=table.frequencies, above=8))
    with pytest.raises(UnsupportedError, match="differ in when a text is a long one"):
        check_native(replace(spec, ropes=(table, other)), tmp_path)


def test_a_generation_over_the_border(tmp_path: Path) -> None:
    """As transformers' generate does for Phi 3, the text is read anew where it becomes a long one."""
    model = save(tmp_path / "model", "phi3", "longrope, long")
    bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, quantize="none")
    with bedplate.Engine(bundle, kv="float32") as engine:
        session = engine.session()
        prompt = engine.tokenizer.decode(TOKENS[:8])
        session.generate(prompt, max_tokens=14)
        ids = list(session.tokens)
        start = len(engine.tokenizer.encode(prompt))
        assert start < 16 < len(ids)
        for at in range(start, len(ids)):
            assert ids[at] == theirs(model, ids[:at]).numpy()[-1].argmax()
        # A shorter text again: nothing of what was computed for the long one is of use.
        again = engine.session().generate(prompt, max_tokens=3)
        assert session.generate(prompt, max_tokens=3) == again and session.last.reused_tokens == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_in_few_bits_with_an_adapter(family: str, tmp_path: Path) -> None:
    """Beside transformers and PEFT, with an adapter of all linears in 8 bits: as near as such codes allow."""
    model, adapter = save_with_adapter(tmp_path, family)
    base, adapted = (x.numpy()[9:] for x in (theirs(model, TOKENS), with_peft(model, adapter, TOKENS)))
    assert rms(adapted - base) > 0.3 * rms(base)
    off: dict[str, list[float]] = {}
    for name, options in RECIPES.items():
        bundle = bedplate.build(model, tmp_path / "toy.bundle", programs=False, force=True, **options)
        bundle.add(adapter, name="a", quantize="8w")
        found = ((logits(bundle), base), (logits(bundle, "a"), adapted))
        off[name] = [rms(got - expected) / rms(expected) for got, expected in found]
    # 8 bits are 16 times as fine as 4, beside inputs that have 8 bits in both. Random layers enlarge errors that they
    # pass on, those of Gemma most: it has no norm after a layer's halves, and weights of norms up to 1.9.
    assert max(off["8 bits"]) < (0.25 if family == "gemma" else 0.08)
    assert all(eight < four / 2 for eight, four in zip(off["8 bits"], off["4 bits"], strict=True))
    # Recovery brings what each linear gives nearer (quantize/test_correction.py), which random layers can undo.
    assert max(off["recovered"][0], off["4 bits"][0]) < 0.7


RECIPES: dict[str, dict[str, Any]] = {
    "8 bits": {"quantize": "8da8w"},
    "4 bits": {"recovery_rank": 0},
    "recovered": {"recovery_rank": 8},
}


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


# A toy of each family. Gemma 2 usually caps scores, which no program can.
PROGRAMS = [
    (family, {"gemma2": "no caps, biases", "stablelm": "parallel, biases"}.get(family, "first"))
    for family in FAMILIES
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [*PROGRAMS, ("phi3", "partial"), ("granitemoehybrid", "no rotation")], ids="-".join
)
def test_a_program_computes_what_transformers_does(
    variant: tuple[str, str], unit_cache: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "model", *variant)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize="none", unit_cache=unit_cache)
    check_program(bundle)
    assert program_keys(bundle.base_program) == keys_in_programs(bundle)
    program, expected = stock_program(bundle), theirs(model, TOKENS).numpy()
    # Keys and values of another text, which lie behind a text's end, must not count.
    program.logits(TOKENS[::-1])
    steps = [program.step(TOKENS[:10], 0), *(program.step([TOKENS[at]], at) for at in range(10, LENGTH))]
    # Sums of the same terms in another order; the largest logits are about 10.
    np.testing.assert_allclose(np.stack(steps), expected[9:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(program.logits(TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_windows_in_a_text_of_many_steps(unit_cache: Path, tmp_path: Path) -> None:
    """Longer than one call of `logits` takes, and than one of `forward`."""
    model = save(tmp_path / "model", "mistral", max_position_embeddings=600)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize="none", unit_cache=unit_cache)
    program, text = stock_program(bundle), (TOKENS * 25)[:590]
    assert program.limits.max_logits_len < program.limits.max_seq_len < len(text)
    expected = theirs(model, text).numpy()
    np.testing.assert_allclose(program.logits(text), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(program.step(text, 0), expected[-1], rtol=0, atol=1e-4)


# Of one layer of each kind: how programs of many layers are linked, those in float and link/test_stretch.py show.
# With corrections, which 4 bits have, a program takes half as long again to lower.
IN_4_BITS = ("gemma3_text", "qwen3")
# And those of an adapter as long as those of its base: here are all forms of layers that its branches can stand in.
WITH_ADAPTER = (*IN_4_BITS, "phi3", "cohere2", "olmo2", "nemotron")


@pytest.mark.slow
@pytest.mark.parametrize("variant", PROGRAMS, ids="-".join)
def test_programs_in_few_bits_compute_what_the_eager_model_does(
    variant: tuple[str, str], unit_cache: Path, tmp_path: Path
) -> None:
    """Of the base, and of an adapter of all linears in 8 bits on the same foundation."""
    model, adapter = save_with_adapter(tmp_path, *variant, **few_layers(*variant))
    recipe = "8da4w" if variant[0] in IN_4_BITS else "8da8w"
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize=recipe, unit_cache=unit_cache)
    foundation = keys_in_programs(bundle)
    assert program_keys(bundle.base_program) == foundation
    check_program(bundle)
    check_logits(bundle, eager_decoder(model, bundle))
    if variant[0] in WITH_ADAPTER:
        bundle.add(adapter, name="a", quantize="8w", unit_cache=unit_cache)
        own = read_ptd(bundle.adapters["a"].weights).entries
        assert program_keys(bundle.adapters["a"].program) == foundation | own.keys()
        check_program(bundle, "a")
        check_logits(bundle, eager_decoder(model, bundle, adapter, "8w"), "a")


def check_logits(bundle: bedplate.Bundle, eager: Decoder, adapter: str | None = None) -> None:
    """They are those of the same modules in PyTorch."""
    expected = eager_logits(eager, TOKENS).numpy()
    found = stock_program(bundle, adapter or "base").logits(TOKENS)
    # Both quantize activations to 8 bits, and where one lies on the border of two codes they may choose
    # differently, as in test_numerics.py.
    assert np.median(np.abs(found - expected)) < 0.02 * expected.std()
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


def check_program(bundle: bedplate.Bundle, adapter: str | None = None) -> None:
    """It has layers + 2 delegates, and the methods that ExecuTorch's runners read."""
    program = deserialize_pte_binary(bundle.program(adapter).read_bytes()).program
    plans = {plan.name: plan for plan in program.execution_plan}
    layers = bundle.manifest.model["layers"]
    assert [len(plans[name].delegates) for name in ("forward", "logits")] == [len(layers) + 2] * 2
    assert plans.keys() == {"forward", "logits"} | METADATA


METADATA = {
    *("get_bos_id", "get_eos_ids", "get_max_seq_len", "get_max_context_len", "get_max_logits_len"),
    *("get_n_layers", "get_vocab_size", "use_kv_cache", "use_sdpa_with_kv_cache", "enable_dynamic_shape"),
}


def test_a_model_with_capped_scores_has_no_program(tmp_path: Path) -> None:
    """Nobody gets a program that computes something else."""
    notices = Notices()
    bundle = bedplate.build(
        save(tmp_path / "model", "gemma2"), tmp_path / "toy.bundle", quantize="none", reporter=notices
    )
    assert bundle.base_program is None
    assert [text for text in notices.texts if "the bundle has no programs" in text and "capped at 2" in text]


class Notices:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def progress(self, stage: str, done: int, total: int | None) -> None: ...

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_the_table_in_the_docs_names_every_family() -> None:
    _, table = DOCS.read_text("utf-8").split("| `model_type` | models |")
    assert re.findall(r"^\| `(\w+)` \| [^|]+ \|$", table, re.MULTILINE) == list(TOYS)


def test_the_example_in_the_docs_is_the_file() -> None:
    assert f"```python\n{inspect.getsource(glm4)}```" in DOCS.read_text("utf-8")
