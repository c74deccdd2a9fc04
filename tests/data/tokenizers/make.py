"""Make the files of this folder: parts of real vocabularies, and the tokens that the models' own tokenizers give.

usage: python make.py VOCABULARIES TEKKEN
    VOCABULARIES: the folder `models` of llama.cpp's sources. Its `.inp` have texts, its `.out` the ids that
    transformers gives with the tokenizer of the original model.
    TEKKEN: a `tekken_….json` of the package mistral-common. tiktoken gives the ids.

A part has every token that the texts hold anywhere, so these texts are merged as with the whole vocabulary.
"""

from __future__ import annotations

import base64
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import tiktoken
from transformers.convert_slow_tokenizer import bytes_to_unicode

HERE = Path(__file__).parent
NAMES = ("llama-bpe", "qwen2", "command-r", "gpt-2", "starcoder", "refact", "llama-spm", "phi-3")
KEPT = (
    "model",
    "pre",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "add_bos_token",
    "add_space_prefix",
)
BYTES = bytes_to_unicode()


def texts(vocabularies: Path) -> list[str]:
    text = (vocabularies / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode()
    return text.split("\n__ggml_vocab_test__\n")


def part(
    tokens: list[str], types: list[int], scores: list[float], merges: list[str], held: str, special: set[int]
) -> dict[str, Any]:
    """The tokens that a text holds, with other ids; and the merges that make them."""
    number = {token: index for index, token in enumerate(tokens)}
    kept = [
        index
        for index, token in enumerate(tokens)
        if types[index] == 6 or index in special or len(token) == 1 or (types[index] == 1 and token in held)
    ]
    there = {tokens[index] for index in kept}
    pairs = [merge.split(" ") for merge in merges]
    return {
        "ids": {index: place for place, index in enumerate(kept)},
        "tokens": [tokens[index] for index in kept],
        "token_type": [types[index] for index in kept],
        "scores": [scores[index] for index in kept] if scores else None,
        "merges": [
            f"{left} {right}"
            for left, right in pairs
            if {left, right, left + right} <= there and left in number
        ],
    }


def held_by(some: list[str], *, spaces: bool) -> str:
    """The texts in the form of a vocabulary: with ▁ for spaces, or as characters for bytes."""
    if spaces:
        return "\n".join("▁" + text.replace(" ", "▁") for text in some)
    every = [form for text in some for form in (text, unicodedata.normalize("NFC", text))]
    return "\n".join("".join(BYTES[byte] for byte in text.encode()) for text in every)


def from_gguf(vocabularies: Path, name: str, some: list[str]) -> dict[str, Any]:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    values = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items()}
    special = [index for index, kind in enumerate(fields["token_type"]) if kind in (2, 3, 4)]
    ends = {fields[key] for key in ("bos_token_id", "eos_token_id", "unknown_token_id") if key in fields}
    wanted = {*special[:30], *ends} | {index for index in special if fields["tokens"][index] == "<|end|>"}
    spaces = fields["model"] == "llama"
    found = part(
        fields["tokens"],
        fields["token_type"],
        [float(score) for score in fields.get("scores", [])] if spaces else [],
        fields.get("merges", []),
        held_by(some, spaces=spaces),
        wanted,
    )
    ids = found.pop("ids")
    lines = (vocabularies / f"{path.name}.out").read_text().split("\n")
    kept = {key: ids[fields[key]] if key.endswith("_id") else fields[key] for key in KEPT if key in fields}
    return {
        "architecture": values["general.architecture"],
        "fields": kept | {key: value for key, value in found.items() if value is not None},
        "expected": [[ids[int(one)] for one in line.split()] for line in lines],
    }


def from_tekken(path: Path, some: list[str]) -> dict[str, Any]:
    data = json.loads(path.read_text())
    count = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(one["token_bytes"]): one["rank"] for one in data["vocab"][:count]}
    encoding = tiktoken.Encoding(
        "tekken", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    held = held_by(some, spaces=False)
    shown = {"".join(BYTES[byte] for byte in token): rank for token, rank in ranks.items()}
    tokens = [token for token in shown if len(token) == 1 or token in held]
    number = {token: index + 2 for index, token in enumerate(tokens)}
    merges = sorted(
        (shown[token], shown[token[:at]], shown[token[at:]], f"{token[:at]} {token[at:]}")
        for token in tokens
        for at in range(1, len(token))
        if token[:at] in number and token[at:] in number
    )
    by_rank = {rank: token for token, rank in shown.items()}
    return {
        "architecture": "llama",
        "pattern": data["config"]["pattern"],
        "fields": {
            "model": "gpt2",
            "pre": "tekken",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tokens": ["<s>", "</s>", *tokens],
            "token_type": [3, 3, *(1 for _ in tokens)],
            "merges": [merge for *_, merge in merges],
        },
        "expected": [[number[by_rank[one]] for one in encoding.encode_ordinary(text)] for text in some],
    }


def main() -> None:
    vocabularies, tekken = Path(sys.argv[1]), Path(sys.argv[2])
    some = texts(vocabularies)
    made = {name: from_gguf(vocabularies, name, some) for name in NAMES} | {
        "tekken": from_tekken(tekken, some)
    }
    for name, content in made.items():
        text = json.dumps({"texts": some, **content}, ensure_ascii=False, separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
