"""The tensors of a safetensors file as float32 arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from bedplate.errors import AdapterError
from bedplate.model.adapter.types import AGAIN
from bedplate.model.json_file import damaged

_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def read_file(path: Path, *, hint: str = AGAIN) -> bytes:
    """The bytes of a file of an adapter folder. Raises AdapterError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterError(f"there is no {path.name}", where=path.parent, hint=hint) from None
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", where=path, hint=AGAIN) from None


def parse_safetensors(data: bytes, where: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, widened or rounded to float32. Raises AdapterError; it names the tensor."""
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AdapterError(
            f"is not a whole safetensors file: {error}", where=where, hint=damaged(where, AGAIN)
        ) from None
    tensors = {}
    for name, entry in entries:
        raw, kind, shape = entry["data"], entry["dtype"], entry["shape"]
        if kind == "BF16":  # numpy has no bfloat16: it is the upper half of a float32
            value = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif kind in _DTYPES:
            with np.errstate(over="ignore"):
                value = np.frombuffer(raw, _DTYPES[kind]).astype(np.float32)
        else:
            raise AdapterError(f"tensor {name} has dtype {kind}", where=where, hint="save it as float32")
        check_finite(name, value, where)
        tensors[name] = value.reshape(shape)
    return tensors


def check_finite(name: str, value: NDArray[np.float32], where: Path) -> None:
    """AdapterError: there is NaN or infinity in it."""
    if not np.isfinite(value).all():
        hint = "the training diverged, or the file is damaged: save the adapter again from an earlier step"
        raise AdapterError(f"tensor {name} holds NaN or infinity", where=where, hint=hint)
