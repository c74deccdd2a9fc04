"""Properties that every family has, each shown for each: the columns of the table in docs/inputs.md."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_families_run
import torch
from eager import check_quantized, eager_decoder, eager_logits
from families import make_toy, quiet, save_adapter, save_toy, theirs_of, toy_fields
from grouped import grouped
from numpy.typing import NDArray
from peft import LoraConfig
from stock_runner import StockRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy import save_toy_tokenizer

import bedplate
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.families import FAMILIES
from bedplate.model.stored import stored_linears

pytestmark = pytest.mark.slow

VOCABULARY, CONTEXT = 320, 160
# Two blocks of keys and values, and more; many times a window of the toys.
TOKENS = torch.randint(0, VOCABULARY, (150,), generator=torch.Generator().manual_seed(1)).tolist()
NAMES = [None, "a"]
Logits = NDArray[np.float32]


class Toy:
    """A model of widths that few bits can have, an adapter of all its linears, and bundles with it in 8 bits."""

    def __init__(self, folder: Path, family: str, variant: str) -> None:
        self.model = folder / "model"
        sizes = {"intermediate_size": 64, "shared_intermediate_size": 64, "max_position_embeddings": CONTEXT}
        save_toy(self.model, make_toy(family, variant, vocab_size=VOCABULARY, **sizes))
        save_toy_tokenizer(self.model, VOCABULARY)
        linears = [name.rpartition(".")[2] for name in stored_linears(open_checkpoint(self.model).spec)]
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
        self.adapter = save_adapter(folder / "adapter", self.model, lora)
        self.bundles = {
            recipe: bedplate.build(
                self.model, folder / f"{recipe}.bundle", programs=False, quantize=recipe, recovery_rank=0
            )
            for recipe in ("8da4w", "8da8w")
        }
        for bundle in self.bundles.values():
            bundle.add(self.adapter, name="a", quantize="8w", programs=False)


@pytest.fixture(scope="module")
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    family, variant = request.param if isinstance(request.param, tuple) else (request.param, "first")
    return Toy(tmp_path_factory.mktemp(family), family, variant)


@pytest.mark.parametrize("toy", FAMILIES, indirect=True)
def test_few_bits_are_those_of_the_eager_model(toy: Toy) -> None:
    check_against_eager(toy, None)


@pytest.mark.parametrize("toy", FAMILIES, indirect=True)
def test_an_adapter_in_8_bits_is_that_of_the_eager_model(toy: Toy) -> None:
    check_against_eager(toy, "a")


def check_against_eager(toy: Toy, name: str | None) -> None:
    """The model that rounds inputs in groups, as bedplate does, gives the same logits."""
    # Of one long text, chance would decide which of two ways of rounding costs more: an error goes on to its end.
    texts = [TOKENS[at : at + 5] for at in range(0, 60, 5)]
    # Random layers of Gemma enlarge errors that they pass on: it has no norms after the halves of a layer.
    noise = 0.08 if open_checkpoint(toy.model).spec.model_type == "gemma" else 0.05
    for bundle in toy.bundles.values():
        decoder = eager_decoder(toy.model, bundle, toy.adapter if name else None, "8w" if name else "none")
        same = grouped(decoder)
        with bedplate.Engine(bundle, threads=1, kv="float32") as engine:
            found = [engine.session(name).logits(text) for text in texts]
            whole = engine.session(name).logits(TOKENS[:60])
        cost = check_quantized(np.concatenate(found), decoder, *texts, noise=noise)
        off = [np.abs(eager_logits(same, text).numpy() - one) for text, one in zip(texts, found, strict=True)]
        # float32 sums in another order put an input that lies between two codes on the other side, in few texts.
        assert np.median([one.max() for one in off]) < 0.02 * cost
        # A long text has some, and what comes after them differs by about what rounding costs.
        assert np.median(np.abs(whole - eager_logits(same, TOKENS[:60]).numpy())) < cost


@pytest.mark.parametrize("toy", FAMILIES, indirect=True)
def test_a_row_is_the_same_bits_in_any_company(toy: Toy) -> None:
    """Alone, beside other sessions, adapters and positions, in any pieces, on any number of threads."""
    expected = by_tokens(toy)
    for threads in (1, 3):
        with bedplate.Engine(toy.bundles["8da4w"], threads=threads) as engine:
            for seed in range(3):
                check_company(engine, expected, random.Random(seed))


def by_tokens(toy: Toy) -> dict[str | None, Logits]:
    """Logits of every position, token by token, alone."""
    with bedplate.Engine(toy.bundles["8da4w"], threads=1) as engine:
        sessions = {name: engine.session(name) for name in NAMES}
        return {
            name: np.stack([session.step([token]) for token in TOKENS]) for name, session in sessions.items()
        }


def check_company(engine: bedplate.Engine, expected: dict[str | None, Logits], draw: random.Random) -> None:
    sessions = [(engine.session(name), name) for name in draw.choices(NAMES, k=5)]
    done = [0] * len(sessions)
    while rest := [i for i, count in enumerate(done) if count < len(TOKENS)]:
        chosen = draw.sample(rest, draw.randint(1, len(rest)))
        counts = {i: min(draw.choice([1, 1, 2, 17, 60]), len(TOKENS) - done[i]) for i in chosen}
        parts = [(sessions[i][0], TOKENS[done[i] : done[i] + count]) for i, count in counts.items()]
        rows = engine.step(parts)
        for row, (i, count) in zip(rows, counts.items(), strict=True):
            done[i] += count
            np.testing.assert_array_equal(row, expected[sessions[i][1]][done[i] - 1])


@pytest.fixture(scope="module")
def stock_runner() -> Iterator[StockRunner]:
    runner = StockRunner()
    yield runner
    runner.close()


@pytest.mark.parametrize("variant", test_families_run.PROGRAMS, ids="-".join)
def test_executorchs_runner_writes_what_transformers_does(
    variant: tuple[str, str], stock_runner: StockRunner, unit_cache: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_toy(model, make_toy(*variant, vocab_size=VOCABULARY))
    save_ascii_tokenizer(model)
    bundle = bedplate.build(model, tmp_path / "toy.bundle", quantize="none", unit_cache=unit_cache)
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_file))
    ids = tokenizer.encode(PROMPT).ids
    with torch.no_grad():
        written = quiet(
            lambda: theirs_of(model).generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
        )
    expected = [
        tokenizer.decode([token], skip_special_tokens=False) for token in written[0, len(ids) :].tolist()
    ]
    program, data = bundle.base_program, bundle.foundation
    assert program is not None
    assert stock_runner.pieces(program, data, bundle.tokenizer_file, PROMPT, 20) == expected


PROMPT = "Every token is text."


def save_ascii_tokenizer(folder: Path) -> None:
    """Whatever a random model writes with it is text: ExecuTorch's runner gives only whole characters to Python."""
    special = ["<|im_start|>", "<|im_end|>"]
    characters = [*map(chr, range(33, 127)), "Ġ"]
    pairs = [one + other for one in string.ascii_lowercase for other in string.ascii_lowercase]
    merged = pairs[: VOCABULARY - len(special) - len(characters)]
    vocabulary = {token: id for id, token in enumerate([*special, *characters, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(a, b) for a, b in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


DOCS = Path(__file__).parent.parent / "docs" / "inputs.md"
# A column of the table → the test that runs for each family.
COLUMNS: dict[str, Any] = {
    "float": test_families_run.test_a_bundle_computes_what_transformers_does,
    "few bits": test_few_bits_are_those_of_the_eager_model,
    "adapter": test_an_adapter_in_8_bits_is_that_of_the_eager_model,
    "company": test_a_row_is_the_same_bits_in_any_company,
    "program": test_families_run.test_a_program_computes_what_transformers_does,
    "program in few bits": test_families_run.test_programs_in_few_bits_compute_what_the_eager_model_does,
    "runner": test_executorchs_runner_writes_what_transformers_does,
}


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    text = DOCS.read_text("utf-8")
    for column, test in COLUMNS.items():
        assert re.search(
            rf"^\| \*\*{column}\*\* \| .+ \| `[\w/]+.py::{test.__name__}` \|$", text, re.MULTILINE
        )
    table = [f"| `model_type` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        cells = [cell(family, column, toys_of(test)) for column, test in COLUMNS.items()]
        table.append(f"| `{family}` | {' | '.join(cells)} |")
    assert "\n".join(table) in text


def toys_of(test: Any) -> set[tuple[str, str]]:
    """(model_type, name of a toy) of all that a test runs for."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    given = [value if isinstance(value, tuple) else (value, "first") for value in mark.args[1]]
    return {(family, variant) for family, variant, *_ in given}


def cell(family: str, column: str, toys: set[tuple[str, str]]) -> str:
    """✓: it is tested. Programs: without caps on scores, which none has."""
    variants = [variant for other, variant in toys if other == family]
    assert variants, f"{column} is not tested for {family}"
    without = not any(toy_fields(family, variant).get("attn_logit_softcapping") for variant in variants)
    return "✓ without caps" if without and toy_fields(family).get("attn_logit_softcapping") else "✓"
