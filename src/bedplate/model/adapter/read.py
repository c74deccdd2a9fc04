"""A folder or file of any known adapter format → an adapter that fits the model."""

from __future__ import annotations

from pathlib import Path

from bedplate.errors import NotFoundError
from bedplate.model.adapter.fit import fit
from bedplate.model.adapter.peft import WEIGHTS, read_peft
from bedplate.model.adapter.peft_config import CONFIG
from bedplate.model.adapter.types import Adapter, RawAdapter
from bedplate.model.spec import ModelSpec


def read_adapter(path: Path, spec: ModelSpec) -> Adapter:
    """Read an adapter and check it against the model.

    Raises NotFoundError, AdapterError or UnsupportedError.
    """
    return fit(_read_raw(path, spec), spec)


def _read_raw(path: Path, spec: ModelSpec) -> RawAdapter:
    if not path.is_dir():
        raise NotFoundError("no such folder", where=path, hint=f"give a folder with {CONFIG} and {WEIGHTS}")
    return read_peft(path, spec)
