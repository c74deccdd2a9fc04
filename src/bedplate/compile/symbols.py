"""Where a lowered program names constants by ExecuTorch's keys or by module paths, put placeholders of symbols.

This is also where the packing is proven: each constant that the lowering produced must be, byte for byte, one that
`quantize.packing` made from the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from bedplate.compile.units import Lowered, placeholder
from bedplate.compile.xnnpack import RawProgram
from bedplate.constants import KEY_LENGTH, Constant
from bedplate.errors import LoweringError
from bedplate.names import KEY_IN_PROGRAM


def symbolize(
    raw: RawProgram,
    constants: Mapping[str, Constant],
    fixed: Mapping[str, Constant],
    buffers: Mapping[str, Constant],
) -> Lowered:
    """Replace every key by its symbol's placeholder. Raises LoweringError for a constant of other bytes than ours.

    buffers: what the program's tensors hold that belong to modules, by module path. Each is one of `fixed`.
    """
    known = {**constants, **fixed}
    symbol_of = executorch_keys(known)
    for key, data in raw.delegate_data.items():
        if symbol_of.get(key.removeprefix("scale_")) is None:
            raise LoweringError(
                f"the lowering packed a constant of {len(data)} bytes that bedplate packs in another way",
                where=key,
                hint="the installed executorch is not the one that bedplate was made for",
            )
    symbol_of |= {placeholder(symbol): symbol for symbol in raw.joined}
    program = copy.copy(raw.program)
    used: dict[str, None] = {}
    program.backend_delegate_data = [
        type(blob)(data=_rename_payload(blob.data, symbol_of, used))
        for blob in raw.program.backend_delegate_data
    ]
    by_key = {constant.key: symbol for symbol, constant in fixed.items()}
    renamed = {path: by_key[constant.key] for path, constant in buffers.items() if constant.key in by_key}
    program.execution_plan = [
        _rename_tensors(copy.deepcopy(plan), known, renamed, used) for plan in raw.program.execution_plan
    ]
    return Lowered(
        program=program,
        symbols=tuple(used),
        fixed={symbol: constant for symbol, constant in fixed.items() if symbol in used},
    )


def executorch_keys(constants: Mapping[str, Constant]) -> dict[str, str]:
    """Symbols by ExecuTorch's keys of what delegates hold, given constants by symbol."""
    held = {symbol: constant for symbol, constant in constants.items() if not constant.is_tensor}
    return {hashlib.sha256(constant.data.data).hexdigest(): symbol for symbol, constant in held.items()}


def _rename_payload(payload: bytes, symbol_of: Mapping[str, str], used: dict[str, None]) -> bytes:
    def rename(match: re.Match[bytes]) -> bytes:
        symbol = symbol_of.get(match[1].decode())
        if symbol is None:
            return match[0]
        used[symbol] = None
        # All keys get 64 characters, so a later relocation never moves anything; a shorter string may
        # leave its tail unused.
        key = KEY_LENGTH.to_bytes(4, "little") + placeholder(symbol).encode()
        return key.ljust(len(match[0]), b"\0")

    return KEY_IN_PROGRAM.sub(rename, payload)


def _rename_tensors(
    plan: Any, known: Mapping[str, Constant], renamed: Mapping[str, str], used: dict[str, None]
) -> Any:
    for delegate in plan.delegates:
        delegate.compile_specs = []  # they spoke to the lowering; the runtime would only read past them
    for value in plan.values:
        extra = getattr(value.val, "extra_tensor_info", None)
        if extra is None or value.val.allocation_info is not None:
            continue  # not a tensor with a name, or a mutable buffer: its name stays
        path, _, part = extra.fully_qualified_name.rpartition(".")
        full_name = renamed.get(extra.fully_qualified_name, extra.fully_qualified_name)
        symbol = f"{path}.weight#{part}" if part in ("codes", "scales") else full_name
        assert symbol in known, f"the program names the tensor {extra.fully_qualified_name}"
        used[symbol] = None
        extra.fully_qualified_name = placeholder(symbol)
    return plan
