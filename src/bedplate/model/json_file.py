"""Text and JSON files of a checkpoint, read as transformers reads them: UTF-8, and an object at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bedplate.errors import CheckpointError

DAMAGED = "the file is damaged: download it again"
# How a file begins that Git LFS keeps in the place of a large one.
_POINTER = b"version https://git-lfs.github.com/spec/"


def damaged(path: Path, otherwise: str = DAMAGED) -> str:
    """A hint about a file that is not what its name says: `otherwise`, unless Git LFS has not brought it yet."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        is_pointer = False
    return (
        "it is a pointer of Git LFS, not the file: run git lfs pull in its folder"
        if is_pointer
        else otherwise
    )


def read_text(path: Path) -> str:
    """The text of a file. CheckpointError: it cannot be read, or is not UTF-8. FileNotFoundError: it is missing."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"is not UTF-8 text: {error.reason}", where=path, hint=DAMAGED) from None
    except OSError as error:
        hint = "check that it is a file and that you may read it"
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path, hint=hint) from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError: it holds none. FileNotFoundError: it is missing."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError("is nested too deeply", where=path, hint=DAMAGED) from None
    except ValueError as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=path, hint=damaged(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=path, hint=DAMAGED)
    return value


def read_optional_object(path: Path) -> dict[str, Any]:
    """As `read_object`; empty when there is no file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
