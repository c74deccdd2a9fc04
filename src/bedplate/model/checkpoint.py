"""Checkpoints, read tensor by tensor: safetensors folders (sharded or not) and GGUF files.

Parameters have the names, and their rows the order, that `spec` tells of. They come one at a time, so that a model is
never in memory as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.hashing import sha256_file
from bedplate.model.config import check_exists
from bedplate.model.decoder import Decoder
from bedplate.model.gguf_file import GgufFile
from bedplate.model.safetensors_folder import SafetensorsFolder
from bedplate.spec import ModelSpec, parameter_shapes


class Checkpoint(Protocol):
    """A readable checkpoint. `files` are those that its content depends on."""

    path: Path
    spec: ModelSpec

    @property
    def files(self) -> tuple[Path, ...]: ...

    def found(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that is there, by its name in the files; reads no values."""
        ...

    def wanted(self) -> dict[str, tuple[int, ...]]:
        """The shapes that the config wants, by the same names."""
        ...

    def names(self) -> list[str]:
        """The parameters, in the order in which they are best read."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The parameter `name`, floats of the dtype they are stored in."""
        ...


class StoredCheckpoint(Checkpoint, Protocol):
    """A checkpoint whose tensors lie in files."""

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows of the parameter `name`: `count` of them from `first` on, or those that there are."""
        ...


# Of the vocabulary, with a row for each token. They are the largest by far, and none of their rows turn.
_BY_ROWS = ("embed_tokens.weight", "lm_head.weight")
_PIECE_BYTES = 1 << 25


class StoredMatrix:
    """A matrix of a checkpoint, of which some rows are in memory. Reads more of them when they are asked for.

    A tensor of a mapped file counts as memory of the process as far as it was read, until it is gone.
    """

    def __init__(self, checkpoint: StoredCheckpoint, name: str, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._checkpoint, self._name = checkpoint, name
        self._first, self._piece = 0, torch.empty(0, *shape[1:])

    def __getitem__(self, rows: slice) -> Tensor:
        first, stop, _ = rows.indices(self.shape[0])
        if not self._first <= first <= stop <= self._first + len(self._piece):
            row_bytes = 4 * self.shape[1]  # as float32, which is what quantizing makes of it
            count = max(stop - first, _PIECE_BYTES // row_bytes)
            del self._piece  # before the next one is read
            self._piece = self._checkpoint.rows(self._name, first, count)
            self._first = first
            _check_finite(self._checkpoint, self._name, self._piece)
        return self._piece[first - self._first : stop - self._first]


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """Open a model folder or a `.gguf` file, and check names and shapes of its tensors against its config.

    Raises NotFoundError, CheckpointError or UnsupportedError.
    """
    check_exists(path)
    checkpoint: StoredCheckpoint = GgufFile(path) if path.is_file() else SafetensorsFolder(path)
    _check_shapes(checkpoint)
    return checkpoint


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and contents of the files that make the checkpoint."""
    digest = hashlib.sha256(b"bedplate checkpoint v1")
    for path in sorted(checkpoint.files):
        digest.update(f"{path.name}:{sha256_file(path)};".encode())
    return digest.hexdigest()


def expected_model(spec: ModelSpec, corrections: Mapping[str, int] | None = None) -> Decoder:
    """The decoder of this spec, of names and shapes alone. corrections: see Decoder."""
    with torch.device("meta"):
        return Decoder(spec, max_context=1, corrections=corrections, device="meta")


def checked_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """`checkpoint.tensor(name)`. Raises CheckpointError for values that are not finite."""
    tensor = checkpoint.tensor(name)
    _check_finite(checkpoint, name, tensor)
    return tensor


def checked_matrix(checkpoint: StoredCheckpoint, name: str) -> Tensor | StoredMatrix:
    """As `checked_tensor`, but a matrix that is much larger than all others is read as its rows are asked for."""
    if name not in _BY_ROWS:
        return checked_tensor(checkpoint, name)
    return StoredMatrix(checkpoint, name, parameter_shapes(checkpoint.spec)[name])


def _check_finite(checkpoint: Checkpoint, name: str, tensor: Tensor) -> None:
    # NaN is the least and the largest of what holds one. No mask is needed, which would be as large as a layer.
    if not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise CheckpointError(
            f"tensor {name} holds NaN or infinity",
            where=checkpoint.path,
            hint="its training diverged, or the file is damaged: download it again",
        )


def checked_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all, in the order of `names()`, each read when it is asked for."""
    for name in checkpoint.names():
        yield name, checked_tensor(checkpoint, name)


def tied_names(name: str, spec: ModelSpec) -> tuple[str, ...]:
    """The parameters that a checkpoint's tensor fills: a tied head takes the embedding's values."""
    return (name, "lm_head.weight") if spec.tied_head and name == "embed_tokens.weight" else (name,)


def _check_shapes(checkpoint: Checkpoint) -> None:
    found = checkpoint.found()
    # Before a name is made for each layer: the number may be anything.
    if checkpoint.spec.n_layers > len(found):
        raise CheckpointError(
            f"the config wants {checkpoint.spec.n_layers} layers, but there are {len(found)} tensors",
            where=checkpoint.path,
            hint="is a shard missing, or does config.json belong to another model?",
        )
    expected = checkpoint.wanted()
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, the first {missing[0]}",
            where=checkpoint.path,
            hint="is a shard missing, or does config.json belong to another model?",
        )
    if unknown := sorted(found.keys() - expected.keys()):
        raise UnsupportedError(
            f"{len(unknown)} tensors have no place in the decoder, the first {unknown[0]}",
            where=checkpoint.path,
            hint="does config.json belong to another model? If not, bedplate does not know what the model computes "
            "with them",
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {shape}, the config wants {expected[name]}",
                where=checkpoint.path,
                hint="config and weights are not of the same model",
            )
