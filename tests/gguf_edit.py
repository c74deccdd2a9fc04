"""A GGUF with a field of another value, as a writer writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf


def replaced(name: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Writes another value for a field; None: leaves the field out."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(name, None)
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_int64(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)

    return edit
