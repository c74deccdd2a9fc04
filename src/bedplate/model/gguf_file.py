"""A GGUF file as a checkpoint: llama.cpp's names, layout and fields in Hugging Face's terms."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.config import spec_from_config
from bedplate.model.fields import Fields
from bedplate.model.gguf_architectures import Architecture, architecture_of
from bedplate.model.gguf_config import read_config
from bedplate.model.gguf_fields import USE_FOLDER
from bedplate.model.gguf_names import FACTORS, LAYER_LINEARS, LAYER_NORMS, OUTSIDE
from bedplate.model.rotary_order import in_our_order, turned_heads
from bedplate.spec import ModelSpec, RotaryRows, parameter_shapes

_AGAIN = "download it again"
_QKV = ("attn_q", "attn_k", "attn_v")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Read the index of a GGUF file: its fields and where its tensors lie. Takes seconds. Raises CheckpointError."""
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"is not a whole GGUF file: {error}",
            where=path,
            hint="give a Hugging Face folder or a .gguf file; if it is one, download it again",
        ) from None


def gguf_fields(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    """The values of a file's fields by their names. CheckpointError: one cannot be read."""
    try:
        return {name: entry.contents() for name, entry in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"holds a field that is damaged: {error}", where=path, hint=_AGAIN) from None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows of a tensor of the file: `count` of them from `first` on."""

    name: str
    first: int
    count: int


class GgufFile:
    """A `Checkpoint`. Raises CheckpointError or UnsupportedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        reader = open_gguf(path)
        self.fields = gguf_fields(reader, path)
        _check_whole(self.fields, path)
        self._architecture = architecture_of(self.fields, path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in stored.values():
            _check_type(tensor, path)
        factors = {name: _values(stored.pop(name)).tolist() for name in FACTORS if name in stored}
        self._stored = stored
        config = read_config(self.fields, stored, factors, path)
        spec = _as_stored(spec_from_config(config, where=path), self._stored)
        self.spec = _with_factors(spec, factors, self._architecture, path)

    def found(self) -> dict[str, tuple[int, ...]]:
        # The format lists dimensions from the innermost on.
        return {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._stored.items()
        }

    def wanted(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        ours = parameter_shapes(self.spec)
        for name, part in self._parts.items():
            rows = max(part.first + part.count, shapes.get(part.name, (0,))[0])
            shapes[part.name] = (rows, *ours[name][1:])
        return shapes

    def names(self) -> list[str]:
        at = {name: number for number, name in enumerate(self._stored)}
        return sorted(self._parts, key=lambda name: (at[self._parts[name].name], self._parts[name].first))

    def tensor(self, name: str) -> Tensor:
        part = self._parts[name]
        tensor = torch.from_numpy(_values(self._stored[part.name], part))
        heads = turned_heads(".".join(name.split(".")[2:-1]), self.spec)
        rows = RotaryRows(width=self.spec.rotary.width, interleaved=self._architecture.interleaved)
        return in_our_order(tensor, heads, rows) if heads else tensor

    def rows(self, name: str, first: int, count: int) -> Tensor:
        part = self._parts[name]
        count = min(count, part.count - first)
        wanted = _Part(name=part.name, first=part.first + first, count=count)
        return torch.from_numpy(_values(self._stored[part.name], wanted))

    @functools.cached_property
    def _parts(self) -> dict[str, _Part]:
        return _parts(self.spec, self._architecture, self._stored)


def _check_whole(fields: Mapping[str, Any], path: Path) -> None:
    if fields.get("split.count") not in (None, 0, 1):
        raise UnsupportedError(
            "this is one of several files of a model",
            where=path,
            hint="merge them with llama.cpp: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )


def _check_type(tensor: gguf.ReaderTensor, path: Path) -> None:
    """UnsupportedError: the package cannot read tensors of this type. One row tells."""
    try:
        _values(tensor, _Part(name=tensor.name, first=0, count=1))
    except (NotImplementedError, ValueError, IndexError) as error:
        kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        what = f"tensor {tensor.name} of the type {kind} cannot be read: {error}"
        raise UnsupportedError(what, where=path, hint=USE_FOLDER) from None


def _values(tensor: gguf.ReaderTensor, part: _Part | None = None) -> Any:
    """Float32. The rows of a matrix are cut before they are computed: each is made of whole blocks."""
    rows = slice(None) if part is None else slice(part.first, part.first + part.count)
    data = tensor.data
    if data.ndim > 1:
        return np.array(gguf.dequantize(data[rows], tensor.tensor_type), np.float32)
    return np.array(gguf.dequantize(data, tensor.tensor_type)[rows], np.float32)


def _as_stored(spec: ModelSpec, stored: Mapping[str, Any]) -> ModelSpec:
    """Which linears add a bias, no field says: those do that have one."""

    def adds(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in stored for name in names)

    return replace(
        spec,
        qkv_bias=adds(*_QKV, "attn_qkv"),
        output_bias=adds("attn_output"),
        mlp_bias=adds("ffn_gate", "ffn_up", "ffn_down"),
    )


def _with_factors(
    spec: ModelSpec, factors: Mapping[str, Sequence[float]], architecture: Architecture, path: Path
) -> ModelSpec:
    """Frequencies divided by those of the file, where it has them for any length of the text."""
    name = "rope_freqs.weight"
    if name not in factors:
        return spec
    if not architecture.factors or any(table.scale != 1 for table in spec.ropes):
        raise UnsupportedError(
            f"tensor {name} has no place in this architecture", where=path, hint=USE_FOLDER
        )
    pairs = spec.head_dim // 2
    by = np.array(Fields({name: [*factors[name]]}, path).numbers(name, pairs), np.float32)
    return replace(
        spec,
        ropes=tuple(
            replace(table, frequencies=tuple(map(float, np.array(table.frequencies, np.float32) / by)))
            for table in spec.ropes
        ),
    )


def _parts(spec: ModelSpec, architecture: Architecture, stored: Mapping[str, Any]) -> dict[str, _Part]:
    """Where the file has each parameter."""
    shapes = parameter_shapes(spec)
    in_layer = {ours: theirs for theirs, ours in (LAYER_LINEARS | LAYER_NORMS).items()}
    in_layer |= {ours: theirs for theirs, ours in architecture.names.items()}
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    found = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if not path.startswith("layers."):
            found[name] = _Part(name=f"{outside[path]}.{leaf}", first=0, count=shape[0])
            continue
        _, index, module = path.split(".", 2)
        prefix, first, theirs = f"blk.{index}.", 0, in_layer[module]
        if theirs in _QKV and f"{prefix}attn_qkv.{leaf}" in stored:
            before = _QKV[: _QKV.index(theirs)]
            first = sum(shapes[f"layers.{index}.{LAYER_LINEARS[one]}.{leaf}"][0] for one in before)
            theirs = "attn_qkv"
        elif theirs in ("ffn_gate", "ffn_up") and _is_fused(architecture, prefix, leaf, stored):
            first = 0 if theirs == "ffn_gate" else shape[0]
            theirs = "ffn_up"
        found[name] = _Part(name=f"{prefix}{theirs}.{leaf}", first=first, count=shape[0])
    return found


def _is_fused(architecture: Architecture, prefix: str, leaf: str, stored: Mapping[str, Any]) -> bool:
    return architecture.fused and f"{prefix}ffn_gate.{leaf}" not in stored
