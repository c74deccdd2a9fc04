"""A GGUF with a field of another value, as a writer writes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
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


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def edited(
    source: Path, path: Path, edit: Callable[[gguf.GGUFWriter], None], *, without: str | None = None
) -> Path:
    """A file with the fields and tensors of another. without: a pattern of names of tensors that are left out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        if without is None or not re.search(without, tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    edit(writer)
    finish(writer)
    return path
