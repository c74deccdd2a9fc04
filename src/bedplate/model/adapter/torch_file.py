"""The tensors of a file of `torch.save` (`.bin`, `.pt`) as float32 arrays. Imports torch when it is asked for them."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.tensors import check_finite

_SAFE = "bedplate runs no code from a file: save the adapter as safetensors (PEFT: save_pretrained)"
# In torch's errors: what a pickle asks for that is not needed for tensors.
_CODE = re.compile(r"GLOBAL ([\w.]+)")


def parse_torch(data: bytes, where: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, widened or rounded to float32.

    AdapterError: it is no such file, or holds anything but tensors by their names.
    UnsupportedError: torch is not installed.
    """
    torch = _torch(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that is damaged or hostile ends in errors of any kind
        # What torch says besides is how to run the code in the file.
        wanted = _CODE.search(str(error))
        reason = f"it asks for {wanted[1]}" if wanted else "it is damaged"
        raise AdapterError(f"cannot be read as tensors alone: {reason}", where=where, hint=_SAFE) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise AdapterError("does not hold tensors by their names", where=where, hint=_SAFE)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    # What an embedding and a head share is in the file once, and there under two names.
    arrays, room = {}, 2 * len(data)
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise AdapterError(f"{name} is no plain tensor", where=where, hint=_SAFE)
        if value.dtype not in floats:
            kind = str(value.dtype).removeprefix("torch.")
            raise AdapterError(f"tensor {name} has dtype {kind}", where=where, hint="save it as float32")
        # A tensor may be a view of few bytes that claims to be of many.
        room -= value.numel() * value.element_size()
        if room < 0:
            raise AdapterError(
                f"its tensors claim more bytes than the file has, up to {name}", where=where, hint=_SAFE
            )
        arrays[name] = value.detach().to(torch.float32).numpy()
        check_finite(name, arrays[name], where)
    return arrays


def _torch(where: Path) -> Any:
    from bedplate.quiet import import_modules

    try:
        import_modules(["torch"])
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"this file can only be read with the Python package {error.name}",
            where=where,
            hint="pip install 'bedplate[build]', or save the adapter as safetensors",
        ) from None
    import torch

    return torch
