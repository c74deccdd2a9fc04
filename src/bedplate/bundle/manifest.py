"""The JSON files of a bundle: `bundle.json`, `foundation.json`, `adapters/NAME/adapter.json`.

Each begins with its `format` and `version`; a reader refuses any version but its own before it looks further.
`bundle.json` holds the SHA-256 of every other file, and of itself under `digest`, so one flipped byte
anywhere is found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from bedplate.bundle import strict_json
from bedplate.errors import BundleError
from bedplate.hashing import sha256_of_few

VERSION = 5
MANIFEST = "bundle.json"
FOUNDATION = "foundation.ptd"
FOUNDATION_INFO = "foundation.json"
BASE_PROGRAM = "base.pte"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
ADAPTERS = "adapters"
ADAPTER_PROGRAM = "program.pte"
STATIC_PROGRAM = "static.pte"  # of fixed shapes: of the base, and in the folder of each adapter
BASE_PROGRAMS = {"program": BASE_PROGRAM, "static": STATIC_PROGRAM}
ADAPTER_PROGRAMS = {"program": ADAPTER_PROGRAM, "static": STATIC_PROGRAM}
ADAPTER_WEIGHTS = "weights.ptd"
ADAPTER_INFO = "adapter.json"

# What every bundle tells of its model; whoever builds it may tell more.
MODEL_FIELDS: dict[str, type] = {
    "architecture": str,
    "fingerprint": str,
    **dict.fromkeys(
        ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_context"),
        int,
    ),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_T = TypeVar("_T")


class ConstantInfo(NamedTuple):
    """What a constant is: see `bedplate.constants.Constant`. Several names may share one key.

    With the bytes, it says all that the key is made of.  scales: the key of the scales that this key covers.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    scales: str | None
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class FoundationInfo:
    """`foundation.json`: the names behind the keys of `foundation.ptd`."""

    constants: tuple[ConstantInfo, ...]


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """`adapter.json`.

    foundation: SHA-256 of the `foundation.ptd` that it was packed against.
    rank: the rank of the adapter. ranks: the ranks of its matrices, by the suffix of the module that they adapt. They
    are higher if zeros fill them up to the rank of a compiled program.
    dtype: how A and B are packed, "float32" or "8w".
    layers: the base's layer of each of its layers, whose weights it uses. None: the base's layers, each once.
    vocab: how many tokens it knows: those of the base, or more.
    invocation: the tokens that turn an activated LoRA on. None: it is on from the first token of a text.
    source: fingerprint of the files it came from.
    constants: what its `weights.ptd` holds.  shared: its constants that the foundation holds, under the same keys.
    """

    name: str
    foundation: str
    rank: int
    ranks: dict[str, int]
    alpha: float
    dtype: str
    layers: tuple[int, ...] | None
    vocab: int
    invocation: tuple[int, ...] | None
    source: str
    constants: tuple[ConstantInfo, ...]
    shared: tuple[ConstantInfo, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The suffixes of the modules that it adapts."""
        return tuple(self.ranks)

    @property
    def unit_rank(self) -> int:
        """The highest of its `ranks`."""
        return max(self.ranks.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """special_tokens: `bos_token`, `eos_token` … as text, for the chat template."""

    sha256: str
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """An adapter as `bundle.json` knows it. files: by their names in the adapter's folder.

    special_tokens: as in TokenizerInfo. None: the adapter has no tokenizer of its own and uses the base's.
    """

    foundation: str
    files: dict[str, FileInfo]
    special_tokens: dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`bundle.json`.

    written_by: the version of bedplate that wrote it.  model: its dimensions, at least MODEL_FIELDS, and
    what else its builder adds.  files: by path in the bundle. The files of adapters are listed with the adapters.
    A bundle without programs lists none.
    """

    written_by: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    tokenizer: TokenizerInfo
    files: dict[str, FileInfo]
    adapters: dict[str, AdapterRecord]


_FORMATS: dict[type, str] = {
    Manifest: "bedplate bundle",
    FoundationInfo: "bedplate foundation",
    AdapterInfo: "bedplate adapter",
}


def dump(document: Manifest | FoundationInfo | AdapterInfo) -> bytes:
    """The bytes of the JSON file; equal documents are equal bytes."""
    fields = {**vars(document), "format": _FORMATS[type(document)], "version": VERSION}
    if isinstance(document, Manifest):
        fields["digest"] = _digest(fields)
    return strict_json.dump(fields)


def load(kind: type[_T], data: bytes, where: str) -> _T:
    """Parse a Manifest, FoundationInfo or AdapterInfo from the file that `where` names.

    BundleError: it is not canonical JSON, has another format or version, or a field is missing, unknown or wrong. For
    a Manifest also: its digest does not fit.
    """
    fields = strict_json.load(data, where)
    if fields.get("format") != _FORMATS[kind]:
        raise BundleError(f"not a {_FORMATS[kind]}", where=where, hint="is this the right file?")
    if fields.get("version") != VERSION:
        raise BundleError(
            f"format version {fields.get('version')!r}; this bedplate reads version {VERSION}",
            where=where,
            hint="build the bundle again with this bedplate, or use the bedplate that wrote it",
        )
    if kind is Manifest and fields.pop("digest", None) != _digest(fields):
        raise BundleError("its digest does not fit its content", where=where, hint=strict_json.DAMAGED)
    del fields["format"], fields["version"]
    document = strict_json.decode(kind, fields, where)
    if isinstance(document, Manifest):
        _check(document, where)
    return document


def _digest(fields: dict[str, Any]) -> str:
    return sha256_of_few(strict_json.dump(fields))


def _check(manifest: Manifest, where: str) -> None:
    for name, kind in MODEL_FIELDS.items():
        if type(manifest.model.get(name)) is not kind:
            found = manifest.model.get(name)
            raise BundleError(
                f"the field {name!r} is {found!r}", where=f"{where}.model", hint=strict_json.DAMAGED
            )
    _check_files(manifest.files, (FOUNDATION, FOUNDATION_INFO, TOKENIZER), f"{where}.files")
    for name, record in manifest.adapters.items():
        at = f"{where}.adapters.{name}"
        if not is_adapter_name(name):
            raise BundleError("not a name for an adapter", where=at, hint=strict_json.DAMAGED)
        _check_files(record.files, (ADAPTER_WEIGHTS, ADAPTER_INFO), f"{at}.files")


def _check_files(files: dict[str, FileInfo], required: tuple[str, ...], where: str) -> None:
    for name in required:
        if name not in files:
            raise BundleError(f"it does not list {name}", where=where, hint=strict_json.DAMAGED)
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or str(path) != name or ".." in path.parts:
            raise BundleError(
                f"{name!r} is not the path of a file in it", where=where, hint=strict_json.DAMAGED
            )


def is_adapter_name(name: str) -> bool:
    """Letters, digits, `.`, `_` and `-`, first a letter or digit. Not "base", which means the model itself."""
    return _NAME.fullmatch(name) is not None and name != "base"
