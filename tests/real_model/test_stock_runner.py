"""The files are stock: ExecuTorch's own text runner answers as `bedplate run` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bedplate import Bundle, Engine
from bedplate.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model

MAX_TOKENS = 40
ORDER = "Reply with JSON: item, quantity, city, day.\nCould you get five suitcases to Bergen for Wednesday?"
REVIEW = "Is this review positive, negative or mixed?\nA short note. The ending is really poor."

# ExecuTorch's attention and ours differ in the last bits, which moves some of the 8-bit codes of activations by one,
# and that moves the quantized base's logits by up to 2.5 of 30 (where 8 bits moved them already). An answer that is
# nowhere certain may then go another way where its two best tokens are nearer to each other than this.
NEAR_TIE = 1.5

# In a process of its own: the runner prints on stdout and exits hard when it fails.
RUNNER = """
import json, sys
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
program, data, tokenizer, prompt, count, out = sys.argv[1:]
runner = TextLLMRunner(program, tokenizer, data)
pieces = []
config = GenerationConfig(echo=False, max_new_tokens=int(count), temperature=0.0, num_bos=0, num_eos=0)
runner.generate(prompt, config, pieces.append, None)
open(out, "w").write(json.dumps(pieces))
"""


@pytest.mark.parametrize(("name", "question"), [("extract", ORDER), ("sentiment", REVIEW)])
def test_stock_text_runner_answers_with_the_same_text(
    name: str, question: str, quantized_bundle: Bundle, tmp_path: Path
) -> None:
    assert stock_answer(quantized_bundle, name, question, tmp_path) == our_answer(
        quantized_bundle, name, question
    )


@pytest.mark.parametrize("name", [None, "extract"])
def test_stock_text_runner_answers_with_the_same_text_in_float(
    name: str | None, float_bundle: Bundle, tmp_path: Path
) -> None:
    assert stock_answer(float_bundle, name, ORDER, tmp_path) == our_answer(float_bundle, name, ORDER)


def test_stock_text_runner_goes_another_way_only_at_a_near_tie(
    quantized_bundle: Bundle, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.of_bundle(quantized_bundle)
    end = quantized_bundle.manifest.tokenizer.eos_ids[0]  # an answer may also end where the other goes on
    stock = [*tokenizer.encode(stock_answer(quantized_bundle, None, ORDER, tmp_path)), end]
    ours = [*tokenizer.encode(our_answer(quantized_bundle, None, ORDER)), end]
    common = next((i for i, (a, b) in enumerate(zip(stock, ours, strict=False)) if a != b), None)
    if common is None:
        assert stock == ours
        return
    prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": ORDER}]))
    with Engine(quantized_bundle) as engine:
        logits = engine.session().step(prompt + ours[:common])
    assert logits[ours[common]] - logits[stock[common]] < NEAR_TIE


def our_answer(bundle: Bundle, name: str | None, question: str) -> str:
    with Engine(bundle) as engine:
        answer = engine.session(name).generate([{"role": "user", "content": question}], max_tokens=MAX_TOKENS)
    assert answer.strip()
    return answer


def stock_answer(bundle: Bundle, name: str | None, question: str, folder: Path) -> str:
    program, pieces = folder / "program.pte", folder / "pieces.json"
    bundle.export(program, adapter=name, self_contained=name is not None)
    prompt = Tokenizer.of_bundle(bundle).render([{"role": "user", "content": question}])
    arguments = [program, bundle.foundation, bundle.tokenizer_file, prompt, MAX_TOKENS, pieces]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return "".join(json.loads(pieces.read_text())).removesuffix("<|im_end|>")
