"""A folder or file of any known adapter format → an adapter that fits the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError, NotFoundError
from bedplate.model.adapter import gguf, mlx, peft, torchtune
from bedplate.model.adapter.fit import fit
from bedplate.model.adapter.peft_config import CONFIG
from bedplate.model.adapter.types import Adapter, RawAdapter
from bedplate.spec import ModelSpec

_GIVE = f"give a folder with {CONFIG} and {peft.WEIGHTS}, or a .gguf file"


def read_adapter(path: Path, spec: ModelSpec) -> Adapter:
    """Read an adapter of PEFT, torchtune, MLX-LM or llama.cpp, and check it against the model.

    Raises NotFoundError, AdapterError or UnsupportedError.
    """
    return fit(_read_raw(path, spec), spec)


def _read_raw(path: Path, spec: ModelSpec) -> RawAdapter:
    """The format is what the files say: a config of MLX-LM's, or PEFT's weights before torchtune's, as both are there
    when torchtune has converted its own.
    """
    if path.is_file():
        return _read_file(path, spec)
    if not path.is_dir():
        raise NotFoundError("no such file or folder", where=path, hint=_GIVE)
    data = _bytes(path / CONFIG)
    config = _object(data)
    if mlx.is_mlx(config):
        return mlx.read_mlx(path, config, data, spec)
    converted = any((path / name).is_file() for name in (peft.WEIGHTS, peft.OLDER))
    if not converted and torchtune.find_checkpoints(path):
        return torchtune.read_torchtune(path, spec)
    ggufs = sorted(path.glob("*.gguf"))
    if not converted and ggufs:
        hint = f"give the file itself: {ggufs[0]}"
        raise AdapterError(f"there is no {peft.WEIGHTS}, but there is a GGUF file", where=path, hint=hint)
    if not (path / CONFIG).exists():
        raise AdapterError(f"there is no {CONFIG}", where=path, hint=_where_else(path))
    return peft.read_peft(path, spec)


def _where_else(path: Path) -> str:
    """What to do about a folder that is no adapter: training programs save adapters into folders of their own."""
    if inside := sorted(file.parent for file in path.glob(f"*/{CONFIG}")):
        return f"give the folder of an adapter inside it: {', '.join(map(str, inside[-3:]))}"
    if (path / "config.json").is_file():
        return "this is the folder of a model: make a bundle of it with bedplate build"
    return _GIVE


def _read_file(path: Path, spec: ModelSpec) -> RawAdapter:
    with path.open("rb") as file:
        start = file.read(len(gguf.MAGIC))
    if start != gguf.MAGIC:
        raise AdapterError("is a file, but not a GGUF", where=path, hint=_GIVE)
    return gguf.read_gguf(path, spec)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object; empty where it is none, which the reader of the format then says."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
