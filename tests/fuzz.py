"""Bundles with changed bytes, loaded and run: each ends in a BedplateError or in numbers.

    python tests/fuzz.py --cases 100000 --seed 1 [--keep FOLDER] [BUNDLE …]

A case changes a copy of a bundle: bytes of a data file, or values of what `foundation.json`, `adapter.json` and
`bundle.json` tell, and then makes hashes and digests fit, so that nothing but the content is wrong. Without a BUNDLE,
small ones are made, of every recipe. A case that hangs or takes the process down leaves its number in the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from forged import settle

from bedplate.api import Bundle
from bedplate.bundle import integrity, manifest, strict_json
from bedplate.bundle.manifest import Manifest
from bedplate.errors import BedplateError
from bedplate.runtime.engine import Engine

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
    """Cases of one bundle. folder: where the changed copy lies."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._original, self._copy = bundle, folder / "copy.bundle"
        shutil.copytree(bundle, self._copy)
        self._files = [path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file()]

    def run(self, seed: int, number: int, announce: Callable[[str], None] = lambda what: None) -> Case:
        """AssertionError: it ended in anything but a BedplateError or numbers."""
        draw = random.Random(f"{seed} {number}")
        what = self._change(draw)
        announce(f"{number}: {what}")
        try:
            result = self._use(draw)
        except BedplateError as error:
            result = f"{type(error).__name__}: {error}"
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}, {what}: {error!r}") from error
        finally:
            self._restore()
        return Case(number=number, what=what, result=result)

    def _use(self, draw: random.Random) -> str:
        bundle = Bundle.open(self._copy)
        count = 0
        with Engine(bundle, threads=draw.randint(1, 2), kv=draw.choice(["float16", "float32"])) as engine:
            for name in (None, *sorted(bundle.adapters)):
                session = engine.session(name)
                logits = session.step(
                    [token % engine.limits.vocab for token in TOKENS[: engine.limits.max_context]]
                )
                assert logits.shape == (engine.limits.vocab,) and logits.dtype == np.float32
                count += len(logits)
        return f"{count} numbers"

    def _change(self, draw: random.Random) -> str:
        change = draw.choice([self._index, self._segments, self._segments, self._values])
        suffix = ".json" if change == self._values else ".ptd"
        file = draw.choice(
            [path for path in self._files if path.suffix == suffix and path.name != manifest.TOKENIZER]
        )
        words = [change(self._copy / file, draw) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
        self._settle()
        return f"{file}: {'; '.join(words)}"

    def _index(self, file: Path, draw: random.Random) -> str:
        """Bytes that say where in a data file what is."""
        index = int.from_bytes(file.read_bytes()[24:32], "little")
        return _change_bytes(file, 0, draw.choice([64, 40 + index]), draw)

    def _segments(self, file: Path, draw: random.Random) -> str:
        """Bytes of constants: codes, scales, floats."""
        size = file.stat().st_size
        return _change_bytes(
            file, min(int.from_bytes(file.read_bytes()[32:40], "little"), size - 1), size, draw
        )

    def _values(self, file: Path, draw: random.Random) -> str:
        """Of one place of the document: what a constant says of itself, a dimension, a field of any kind."""
        document = json.loads(file.read_bytes())
        places = list(_places(document if file.name != manifest.MANIFEST else document["model"]))
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
        if file.name == manifest.MANIFEST:
            document.pop("digest")
            document["digest"] = manifest._digest(document)
        file.write_bytes(strict_json.dump(document))
        return (
            f"{key} was {old!r:.60}, is {holder.get(key) if isinstance(holder, dict) else holder[key]!r:.60}"
        )

    def _settle(self) -> None:
        """Hashes that fit, as far as the files can still be read as what they are."""
        try:
            settle(self._copy)
        except BedplateError:
            measured = integrity.measure(self._copy)
            file = self._copy / manifest.MANIFEST
            try:
                document = manifest.load(Manifest, file.read_bytes(), "")
            except BedplateError:
                return
            files = {name: measured[name] for name in document.files}
            records = {
                name: dataclasses.replace(
                    record, files=integrity.measure(self._copy / manifest.ADAPTERS / name)
                )
                for name, record in document.adapters.items()
            }
            file.write_bytes(manifest.dump(dataclasses.replace(document, files=files, adapters=records)))

    def _restore(self) -> None:
        for file in self._files:
            shutil.copyfile(self._original / file, self._copy / file)


def _change_bytes(file: Path, first: int, last: int, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    at, way = draw.randrange(first, max(first + 1, min(last, len(data)))), draw.randrange(16)
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
    file.write_bytes(data)
    return f"byte {at}, way {way}"


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
    start, refused, last = time.monotonic(), 0, ""

    def announce(what: str) -> None:
        nonlocal last
        last = what
        print(f"\r\x1b[K{what:.150}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        bundles = arguments.bundles or make_bundles(Path(temporary))
        fuzzes = [Fuzz(bundle, Path(tempfile.mkdtemp(dir=temporary))) for bundle in bundles]
        for number in range(arguments.first, arguments.first + arguments.cases):
            case = fuzzes[number % len(fuzzes)].run(arguments.seed, number, announce)
            refused += not case.result.endswith("numbers")
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"\n{arguments.cases} cases of seed {arguments.seed} in {seconds:.0f} s: {refused} refused, "
        f"{arguments.cases - refused} gave numbers; peak memory {peak} MB"
    )


# Bundles that hold every kind of constant, and adapters that hold every kind of branch.
RECIPES: dict[str, dict[str, Any]] = {
    "offsets": {"recovery_rank": 2},
    "four": {"method": "plain", "group_size": 64, "embedding": "4", "head": "8da4w"},
    "row": {"group_size": 0, "method": "plain", "overrides": {"layers.*.mlp.down_proj": "8da8w"}},
    "float": {"quantize": "none"},
}


def make_bundles(folder: Path) -> list[Path]:
    """Of a toy of one layer, each with an adapter of all linears in 8 bits and one of three in floats."""
    from toy import save_adapter, save_toy_model, toy_config

    import bedplate

    config = toy_config(num_hidden_layers=1, attention_bias=True, mlp_bias=True, intermediate_size=64)
    save_toy_model(folder / "model", config)
    every = save_adapter(folder / "every", folder / "model", seed=1, rank=2)
    some = save_adapter(folder / "some", folder / "model", seed=2, targets=["q_proj", "v_proj", "down_proj"])
    made = []
    for name, options in RECIPES.items():
        bundle = bedplate.build(folder / "model", folder / f"{name}.bundle", programs=False, **options)
        bundle.add(every, name="every", quantize="8w")
        bundle.add(some, name="some", quantize="none")
        made.append(bundle.path)
    return made


if __name__ == "__main__":
    main()
