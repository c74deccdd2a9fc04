"""Bundles with changed bytes, loaded and run: each ends in a BedplateError or in numbers.

    python tests/fuzz.py --cases 100000 --seed 1 [--keep FOLDER] [BUNDLE …]

A case changes a copy of a bundle: bytes of a data file, or values of what `foundation.json`, `adapter.json` and
`bundle.json` tell, and then makes hashes and digests fit, so that nothing but the content is wrong. Without a BUNDLE,
small ones are made, of many recipes and families. A case that hangs or takes the process down leaves its number in the
last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from forged import signed

from bedplate.api import Bundle
from bedplate.bundle import manifest, strict_json
from bedplate.errors import BedplateError
from bedplate.runtime.engine import Engine
from bedplate.runtime.model_spec import read_spec
from bedplate.spec import linear_shapes

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
# What a file may say in place of a number, and what may stand in place of a value of any kind.
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 255, 256, 1024, 4096),
    *(
        2**15,
        2**16,
        2**24,
        2**24 + 1,
        2**31 - 1,
        2**31,
        2**32,
        2**33,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        10**400,
    ),
    *(-(2**31), -(2**63), -(2**64), 0.5, -1.5, 1e-45, 1e-300, 1e300, 1e38, 0.0, -0.0),
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "float32",
    "int4",
    "int8",
    "uint8",
    "bfloat16",
    [],
    [1],
    {},
    {"a": 1},
    "\x00é",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """number: of the seed.  what: was changed, in words.  result: a BedplateError's text, or how many numbers came."""

    number: int
    what: str
    result: str


class Fuzz:
    """Cases of one bundle, in a copy of it below `folder`.

    Files that no case has changed stay as they are, and so does an engine: a case that changes the files of an adapter
    replaces it under its name while the foundation stays loaded.
    """

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._copy = folder / "copy.bundle"
        shutil.copytree(bundle, self._copy)
        files = [path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file()]
        self._originals = {file.as_posix(): (bundle / file).read_bytes() for file in files}
        self._engine: Engine | None = None

    def run(self, seed: int, number: int, announce: Callable[[str], None] = lambda what: None) -> Case:
        """AssertionError: it ended in anything but a BedplateError or numbers."""
        draw = random.Random(f"{seed} {number}")
        file, data, what = self._change(draw)
        announce(f"{number}: {what}")
        changed = self._settled(file, data)
        try:
            self._write(changed)
            count = (
                self._adapter(file.split("/")[1]) if file.startswith(manifest.ADAPTERS) else self._all(draw)
            )
            result = f"{count} numbers"
        except BedplateError as error:
            result = f"{type(error).__name__}: {error}"
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}, {what}: {error!r}") from error
        finally:
            self._write({name: self._originals[name] for name in changed})
        return Case(number=number, what=what, result=result)

    def _write(self, contents: Mapping[str, bytes]) -> None:
        for name, data in contents.items():
            (self._copy / name).write_bytes(data)

    def _all(self, draw: random.Random) -> int:
        """Numbers of the base and of every adapter, opened anew."""
        bundle = Bundle.open(self._copy)
        with Engine(
            bundle, threads=draw.choice([1, 1, 1, 2]), kv=draw.choice(["float16", "float32"])
        ) as engine:
            return sum(_numbers(engine, name) for name in (None, *sorted(bundle.adapters)))

    def _adapter(self, name: str) -> int:
        """Numbers of an adapter whose files were replaced beside a loaded foundation."""
        if self._engine is None:
            self._engine = Engine(Bundle.open(self._copy), threads=1)
        self._engine.unload(name)
        self._engine.bundle.refresh()
        return _numbers(self._engine, name)

    def _change(self, draw: random.Random) -> tuple[str, bytes, str]:
        """A file, what it holds after the change, and the change in words."""
        change = draw.choice([_index, _segments, _segments, self._values])
        suffix = ".json" if change == self._values else ".ptd"
        file = draw.choice(
            [name for name in self._originals if name.endswith(suffix) and name != manifest.TOKENIZER]
        )
        data, words = self._originals[file], []
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            data, word = change(data, draw)
            words.append(word)
        return file, data, f"{file}: {'; '.join(words)}"

    @staticmethod
    def _values(data: bytes, draw: random.Random) -> tuple[bytes, str]:
        """Of one place of a document: what a constant says of itself, a dimension, a field of any kind."""
        document = json.loads(data)
        # Of the manifest not what lists files: that is made to fit.
        inside = (
            {key: document[key] for key in ("model", "recipe", "tokenizer")}
            if "recipe" in document
            else document
        )
        places = list(_places(inside))
        holder, key = draw.choice(places)
        old = holder[key]
        if type(old) in (int, float) and draw.random() < 0.8:
            near = [old * 2, old // 2, old + 1, old - 1, -old]
            holder[key] = draw.choice(NUMBERS + near)
        elif isinstance(old, str) and draw.random() < 0.6:
            same = [other[where] for other, where in places if isinstance(other[where], str)]
            holder[key] = draw.choice(same)
        elif draw.random() < 0.3 and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = draw.choice(OTHERS)
        new = holder.get(key) if isinstance(holder, dict) else holder[key]
        return strict_json.dump(document | inside), f"{key} was {old!r:.60}, is {new!r:.60}"

    def _settled(self, file: str, data: bytes) -> dict[str, bytes]:
        """The changed file, and those that tell of it, with hashes and digests that fit."""
        changed = {file: data}
        document = json.loads(changed.get(manifest.MANIFEST, self._originals[manifest.MANIFEST]))
        if file == manifest.FOUNDATION:
            foundation = hashlib.sha256(data).hexdigest()
            for name, record in document["adapters"].items():
                path = f"{manifest.ADAPTERS}/{name}/{manifest.ADAPTER_INFO}"
                changed[path] = strict_json.dump(
                    json.loads(self._originals[path]) | {"foundation": foundation}
                )
                record["foundation"] = foundation
        for path, content in changed.items():
            *folder, leaf = path.split("/")
            files = document["adapters"][folder[1]]["files"] if folder else document["files"]
            if path != manifest.MANIFEST:
                files[leaf] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        changed[manifest.MANIFEST] = signed(document)
        return changed


def _numbers(engine: Engine, name: str | None) -> int:
    """How many logits a few tokens have."""
    tokens = [token % engine.limits.vocab for token in TOKENS[: engine.limits.max_context]]
    logits = engine.session(name).step(tokens)
    assert logits.shape == (engine.load(name).vocab,) and logits.dtype == np.float32
    return len(logits)


def _index(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes that say where in a data file what is."""
    return _change_bytes(data, 0, draw.choice([64, 40 + int.from_bytes(data[24:32], "little")]), draw)


def _segments(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Bytes of constants: codes, scales, floats."""
    return _change_bytes(data, min(int.from_bytes(data[32:40], "little"), len(data) - 1), len(data), draw)


def _change_bytes(before: bytes, first: int, last: int, draw: random.Random) -> tuple[bytes, str]:
    data = bytearray(before)
    at, way = draw.randrange(first, max(first + 1, min(last, len(data)))), draw.randrange(16)
    at = min(at, len(data) - 1)  # an earlier change may have cut the file
    if way < 5:
        data[at] ^= 1 << draw.randrange(8)
    elif way < 10:
        data[at] = draw.choice([0, 1, 127, 128, 255])
    elif way < 15:
        width = draw.choice([2, 4, 8])
        # NaN and infinity of all kinds of floats are among them.
        data[at : at + width] = draw.choice(
            [bytes(width), b"\xff" * width, b"\x80\x7f" * (width // 2), draw.randbytes(width)]
        )
    else:
        del data[at : at + draw.randint(1, 300)]
    return bytes(data), f"byte {at}, way {way}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start, refused = time.monotonic(), 0

    def announce(what: str) -> None:
        signal.alarm(LIMIT_S)
        print(f"\r{what.partition(':')[0]}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        bundles = arguments.bundles or make_bundles(Path(temporary))
        before = _peak_mb()
        fuzzes = [Fuzz(bundle, Path(tempfile.mkdtemp(dir=temporary))) for bundle in bundles]
        for number in range(arguments.first, arguments.first + arguments.cases):
            case = fuzzes[number % len(fuzzes)].run(arguments.seed, number, announce)
            refused += not case.result.endswith("numbers")
            assert _peak_mb() - before <= LIMIT_MB, f"case {number} took memory beyond all bounds"
        signal.alarm(0)
    print(
        f"\n{arguments.cases} cases of seed {arguments.seed} from {arguments.first} in "
        f"{time.monotonic() - start:.0f} s: {refused} refused, {arguments.cases - refused} gave numbers; "
        f"memory grew by {_peak_mb() - before} MB at most"
    )


# A case takes milliseconds, and a bundle of a few hundred KB takes few MB; a sanitizer keeps freed memory for a while.
LIMIT_S, LIMIT_MB = 60, 1024


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# Bundles that hold every kind of constant, and descriptions of every kind: family, toy and options of `build`.
BUNDLES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "offsets": ("llama", "biases, untied", {"recovery_rank": 2}),
    "four": (
        "llama",
        "biases, untied",
        {"method": "plain", "group_size": 64, "embedding": "4", "head": "8da4w"},
    ),
    "row": (
        "llama",
        "biases, untied",
        {"group_size": 0, "method": "plain", "overrides": {"layers.*.mlp.down_proj": "8da8w"}},
    ),
    "float": ("llama", "first", {"quantize": "none"}),
    # Windows, capped scores and logits, norms before and after; norms of heads, and two RoPE tables.
    "caps": ("gemma2", "first", {"quantize": "8da8w"}),
    "tables": ("gemma3_text", "first", {"quantize": "none"}),
    # Layer norms with biases, parallel halves, a part of each head turns; norms over all heads.
    "layer norms": ("stablelm", "parallel, biases", {"recovery_rank": 2}),
    "whole norms": ("olmo2", "biases, tied", {"quantize": "8da8w"}),
    # Queries that grow; a text that becomes a long one.
    "growth": ("ministral3", "window, mscale", {"quantize": "8da8w"}),
    "longrope": ("llama", "longrope, short", {"quantize": "8da8w"}),
}
LAYERS, VOCABULARY = 2, 320


def make_bundles(folder: Path) -> list[Path]:
    """Of toys of two layers, each with an adapter of all linears in 8 bits, one of three in floats, and two that hold
    all that an adapter may hold.
    """
    return [_make(folder / name.replace(" ", "-"), *toy) for name, toy in BUNDLES.items()]


def _make(folder: Path, family: str, variant: str, options: Mapping[str, Any]) -> Path:
    from families import FULL, SLIDING, make_toy, save_adapter, save_toy, toy_fields
    from forged_adapter import Drawn, forge_adapter
    from peft import LoraConfig
    from toy import save_toy_tokenizer

    import bedplate

    kinds = {"layer_types": [SLIDING, FULL]} if toy_fields(family, variant).get("layer_types") else {}
    sizes = {"num_hidden_layers": LAYERS, "intermediate_size": 64, "vocab_size": VOCABULARY}
    save_toy(folder / "model", make_toy(family, variant, **sizes, **kinds))
    save_toy_tokenizer(folder / "model", VOCABULARY)
    bundle = bedplate.build(folder / "model", folder / "toy.bundle", programs=False, **options)
    spec = read_spec(bundle)
    every = [name.rpartition(".")[2] for name in linear_shapes(spec)]
    for name, targets, quantize in (("every", every, "8w"), ("some", [*every[:1], *every[-1:]], "none")):
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
        bundle.add(save_adapter(folder / name, folder / "model", lora), name=name, quantize=quantize)
    drawn, vocab, dim = Drawn(linear_shapes(spec), spec.dim, spec.vocab_size), spec.vocab_size, spec.dim
    added = [1, 7, *range(vocab, vocab + 3)]
    own = drawn.layers(2, branches=True, affines=True) | drawn.affine("lm_head", vocab + 3)
    own |= drawn.rows("lm_head", added) | drawn.rows("embed_tokens", added)
    forge_adapter(bundle, "own", own, vocab=vocab + 3, layers=(1, 0), scheme="8w")
    saved = {f"{place}.weight": drawn.floats(vocab + 1, dim) for place in ("lm_head", "embed_tokens")}
    saved |= {"norm.weight": drawn.floats(dim), f"layers.0.{spec.norms[-1]}.weight": drawn.floats(dim)}
    saved |= drawn.branch("lm_head", vocab + 1, dim)
    saved["embed_tokens.lora_a.weight"] = drawn.floats(vocab + 1, 2)
    saved["embed_tokens.lora_b.weight"] = drawn.floats(dim, 2)
    forge_adapter(bundle, "saved", saved, vocab=vocab + 1)
    return bundle.path


if __name__ == "__main__":
    main()
