"""The four ways to ship, each end to end with an answer that can be checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stock import StockProgram
from toy import keys_in_programs

from bedplate import Bundle, Engine
from bedplate.bundle.fit import program_keys
from bedplate.bundle.ptd import read_ptd
from bedplate.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model

QUESTION = "Reply with JSON: name, job, phone.\nMy translator is Carmen, call 325-0150."
ANSWER = {"name": "Carmen", "job": "translator", "phone": "325-0150"}
MESSAGES = [{"role": "user", "content": QUESTION}]


def test_one_self_contained_lora_program(float_bundle: Bundle, tmp_path: Path) -> None:
    """Everything inside one `.pte`; no data file at all; ExecuTorch's own runtime."""
    float_bundle.export(tmp_path / "one.pte", adapter="extract", self_contained=True, with_foundation=True)
    tokenizer = Tokenizer.of_bundle(float_bundle)
    program = StockProgram(tmp_path / "one.pte")
    ids = tokenizer.encode(tokenizer.render(MESSAGES))
    logits = program.run("forward", torch.tensor([ids]), torch.tensor([0]))
    answer: list[int] = []
    while (token := int(logits.argmax())) not in float_bundle.manifest.tokenizer.eos_ids and len(answer) < 60:
        answer.append(token)
        position = torch.tensor([len(ids) + len(answer) - 1])
        logits = program.run("forward", torch.tensor([[token]]), position)
    assert json.loads(tokenizer.decode(answer)) == ANSWER


def test_float_program_with_foundation_and_adapter_files(float_bundle: Bundle) -> None:
    with Engine(float_bundle) as engine:
        assert json.loads(engine.session("extract").generate(MESSAGES, max_tokens=60)) == ANSWER


def test_quantized_base_with_its_foundation(quantized_bundle: Bundle) -> None:
    """Of three capitals two: with 135M parameters, what one CPU rounds otherwise than the next can cost an answer."""
    capitals = {"Japan": "Tokyo", "England": "London", "Russia": "Moscow"}
    with Engine(quantized_bundle) as engine:
        right = 0
        for country, capital in capitals.items():
            question = {"role": "user", "content": f"What is the capital of {country}?"}
            right += capital in engine.session().generate([question], max_tokens=30)
    assert right >= 2


@pytest.mark.parametrize("name", ["extract", "extract8"])
def test_quantized_lora_program_on_the_foundation_of_the_base(name: str, quantized_bundle: Bundle) -> None:
    """Constant by constant: what the adapter's program wants of the foundation is what the base's wants."""
    foundation = read_ptd(quantized_bundle.foundation)
    entry = quantized_bundle.adapters[name]
    own = read_ptd(entry.weights)
    base_keys, keys = program_keys(quantized_bundle.base_program), program_keys(entry.program)
    assert keys - own.entries.keys() == base_keys == keys_in_programs(quantized_bundle)
    assert not own.entries.keys() & foundation.entries.keys()
    with Engine(quantized_bundle) as engine:
        assert json.loads(engine.session(name).generate(MESSAGES, max_tokens=60)) == ANSWER


def test_foundation_is_the_same_constant_by_constant_whoever_builds_it(
    quantized_bundle: Bundle, smollm2: Path, unit_cache: Path, tmp_path: Path
) -> None:
    """A bundle built anew, without adapters, holds the same keys and bytes."""
    import bedplate

    again = bedplate.build(smollm2, tmp_path / "again.bundle", unit_cache=unit_cache)
    ours, theirs = read_ptd(quantized_bundle.foundation), read_ptd(again.foundation)
    assert ours.entries.keys() == theirs.entries.keys()
    for key in ours.entries:
        assert np.array_equal(ours.data(key), theirs.data(key))
    assert again.base_program.read_bytes() == quantized_bundle.base_program.read_bytes()
