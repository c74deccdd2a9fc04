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

QUESTION = (
    "Reply with JSON: item, quantity, city, day.\nWe need ten lamps delivered to our shop in Oslo by Friday."
)
MAX_TOKENS = 40

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


@pytest.mark.parametrize("name", [None, "extract", "sentiment"])
def test_stock_text_runner_gives_the_same_greedy_text(
    name: str | None, quantized_bundle: Bundle, tmp_path: Path
) -> None:
    program = tmp_path / "program.pte"
    quantized_bundle.export(program, adapter=name, self_contained=name is not None)
    tokenizer = Tokenizer.of_bundle(quantized_bundle)
    prompt = tokenizer.render([{"role": "user", "content": QUESTION}])
    arguments = [program, quantized_bundle.foundation, quantized_bundle.tokenizer_file, prompt, MAX_TOKENS]
    pieces = tmp_path / "pieces.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, *map(str, arguments), str(pieces)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stock = "".join(json.loads(pieces.read_text())).removesuffix("<|im_end|>")
    with Engine(quantized_bundle) as engine:
        ours = engine.session(name).generate([{"role": "user", "content": QUESTION}], max_tokens=MAX_TOKENS)
    assert stock == ours
    assert ours.strip()
