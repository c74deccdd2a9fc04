"""A Hugging Face folder → GGUF, by llama.cpp's own converter.

    python benchmarks/converter.py LLAMA_CPP FOLDER OUT.gguf

LLAMA_CPP is a folder with its sources (convert_hf_to_gguf.py, conversion/, gguf-py/). Matrices are stored as bfloat16.
Tokens have names that say nothing: llama.cpp loads no model without a vocabulary of the right size.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def convert(llama_cpp: Path, folder: Path, out: Path, stored: str, *, eager: bool = False) -> None:
    """stored: how matrices are, by the name in `gguf.LlamaFileType`. eager: tensors may all be in memory."""
    for path in (str(llama_cpp / "gguf-py"), str(llama_cpp)):
        if path not in sys.path:
            sys.path.insert(0, path)  # the converter is made for the package `gguf` that comes with it
    gguf: Any = import_module("gguf")
    config = json.loads((folder / "config.json").read_text())
    kind = import_module("conversion").get_model_class(config["architectures"][0])

    def vocabulary(converter: Any) -> None:
        writer, size = converter.gguf_writer, converter.hparams["vocab_size"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a"] + [f"t{number}" for number in range(1, size)])
        writer.add_token_types([gguf.TokenType.NORMAL] * size)
        writer.add_token_merges(["a a"])

    for one in [kind, *kind.__mro__, *vars(kind).values()]:
        if isinstance(one, type) and "set_vocab" in vars(one):
            one.set_vocab = vocabulary  # type: ignore[attr-defined]
    kind(folder, gguf.LlamaFileType[stored], out, eager=eager).write()


if __name__ == "__main__":
    llama_cpp, folder, out = map(Path, sys.argv[1:])
    convert(llama_cpp, folder, out, "MOSTLY_BF16")
