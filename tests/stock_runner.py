"""ExecuTorch's own text runner in a process of its own: it prints on stdout, and exits hard when it fails.

As a program it answers one request after another, each a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class StockRunner:
    def __init__(self) -> None:
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self._answers = os.fdopen(reading)

    def pieces(
        self, program: Path, data: Path | None, tokenizer: Path, prompt: str, max_tokens: int
    ) -> list[str]:
        """What each token that is generated, always the likeliest one, adds to the text."""
        request = [str(program), data and str(data), str(tokenizer), prompt, max_tokens]
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._answers.readline()
        assert answer, f"the runner ended with {self._process.wait()}"
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._answers.close()
        assert self._process.wait(timeout=60) == 0


def _serve(answers: int) -> None:
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    def answer(program: str, data: str | None, tokenizer: str, prompt: str, max_tokens: int) -> Sequence[str]:
        runner: Any = TextLLMRunner(program, tokenizer, data)
        pieces: list[str] = []
        config = GenerationConfig(
            echo=False, max_new_tokens=max_tokens, temperature=0.0, num_bos=0, num_eos=0
        )
        runner.generate(prompt, config, pieces.append, None)
        return pieces

    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            print(json.dumps(answer(*json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
