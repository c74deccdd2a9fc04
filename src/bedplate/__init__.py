"""One quantized foundation, many LoRA adapters, stock ExecuTorch files.

A name is imported when it is first used. So a program that only runs bundles does not import what builds them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bedplate.api import Bundle as Bundle
    from bedplate.api import build as build
    from bedplate.api import evaluate as evaluate
    from bedplate.errors import BedplateError as BedplateError
    from bedplate.runtime.engine import Engine as Engine
    from bedplate.runtime.session import Session as Session

_WHERE = {
    "BedplateError": "bedplate.errors",
    "Bundle": "bedplate.api",
    "Engine": "bedplate.runtime.engine",
    "Session": "bedplate.runtime.session",
    "build": "bedplate.api",
    "evaluate": "bedplate.api",
}
__all__ = ["BedplateError", "Bundle", "Engine", "Session", "build", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bedplate' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
