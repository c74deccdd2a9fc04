"""A program that names constants → a program that holds them."""

from __future__ import annotations

from collections.abc import Mapping

from bedplate.constants import Constant
from bedplate.executorch_1_5 import (
    Buffer,
    DataEntry,
    NamedDataStoreOutput,
    PTEFile,
    TensorDataLocation,
    deserialize_pte_binary,
    serialize_pte_binary,
)

_ALIGNMENT = 16  # what XNNPACK's serializer asks for its constants


def embed(program: bytes, constants: Mapping[str, Constant]) -> bytes:
    """The program with `constants` (by key) inside: it no longer asks a data file for them.

    Constants of delegates become named data of the program; tensors of its own go to its constant segment.
    """
    loaded = deserialize_pte_binary(program).program
    assert not loaded.named_data, "a linked program holds no constants yet"
    # A program without constants comes with an empty segment of them, which would shift those written now.
    assert all(segment.size == 0 for segment in loaded.segments)
    loaded.segments = []
    if not loaded.constant_buffer:
        loaded.constant_buffer = [Buffer(storage=b"")]  # index 0 means: no constant
    buffers: list[bytes] = []
    entries: dict[str, DataEntry] = {}
    for key, constant in sorted(constants.items()):
        if not constant.is_tensor:
            entries[key] = DataEntry(buffer_index=len(buffers), alignment=_ALIGNMENT, tensor_layout=None)
            buffers.append(constant.data.tobytes())
    placed: dict[str, int] = {}
    for plan in loaded.execution_plan:
        for value in plan.values:
            extra = getattr(value.val, "extra_tensor_info", None)
            key = (extra.fully_qualified_name or "") if extra is not None else ""
            if extra is None or key not in constants:
                continue
            if key not in placed:
                placed[key] = len(loaded.constant_buffer)
                loaded.constant_buffer.append(Buffer(storage=constants[key].data.tobytes()))
            assert extra.location == TensorDataLocation.EXTERNAL
            value.val.data_buffer_idx = placed[key]
            value.val.extra_tensor_info = None
    named = NamedDataStoreOutput(buffers=buffers, pte_data=entries, external_data={})
    return bytes(serialize_pte_binary(PTEFile(program=loaded, named_data=named)))
