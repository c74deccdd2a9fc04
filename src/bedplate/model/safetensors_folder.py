"""A Hugging Face folder as a checkpoint: config.json, and model.safetensors or the shards that its index names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.config import read_config, spec_from_config
from bedplate.model.json_file import DAMAGED, damaged, read_object
from bedplate.model.rotary_order import in_our_order
from bedplate.model.stored import Source, sources, stored_shapes

# Left over in files of old transformers versions; recomputed from the config.
_RECOMPUTED = ("rotary_emb.inv_freq", "masked_bias")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS = 4096  # that are compared at once
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where a tensor lies: under `name` in `file`."""

    file: Path
    name: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """A `Checkpoint`. Raises CheckpointError or UnsupportedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_no_adapter(path)
        config_file = path / "config.json"
        self.spec = spec_from_config(read_config(config_file), where=config_file)
        self._stored = _find_tensors(path)
        self.files = (config_file, *sorted({stored.file for stored in self._stored.values()}))
        if self.spec.tied_head and _HEAD in self._stored and _EMBEDDING in self._stored:
            self._check_tied_head()
            del self._stored[_HEAD]

    def found(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._stored.items()}

    def wanted(self) -> dict[str, tuple[int, ...]]:
        return stored_shapes(self.spec)

    def names(self) -> list[str]:
        at = {name: number for number, name in enumerate(self._stored)}
        return sorted(self._sources, key=lambda name: at[self._sources[name].name])

    def tensor(self, name: str) -> Tensor:
        source = self._sources[name]
        value = self._read(source, 0, source.count)
        return in_our_order(value, source.heads, self.spec.rotary) if source.heads else value

    def rows(self, name: str, first: int, count: int) -> Tensor:
        source = self._sources[name]
        assert not source.heads, f"the rows of {name} stand in another order"
        return self._read(source, first, min(count, source.count - first))

    def _read(self, source: Source, first: int, count: int) -> Tensor:
        value = _rows(self._stored[source.name], source.first + first, count)
        return value.float() + source.offset if source.offset else value

    @functools.cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(self.spec)

    def _check_tied_head(self) -> None:
        # transformers, too, takes a head that differs for a model whose config is wrong.
        head, embedding = self._stored[_HEAD], self._stored[_EMBEDDING]
        # Block by block: they are the largest tensors there are.
        blocks = (
            [_rows(stored, first, _ROWS).float() for stored in (head, embedding)]
            for first in range(0, max(head.shape[0], embedding.shape[0]), _ROWS)
        )
        if head.shape != embedding.shape or not all(torch.equal(a, b) for a, b in blocks):
            raise CheckpointError(
                "config.json ties the head to the embedding, but lm_head.weight holds other values",
                where=self._stored[_HEAD].file,
                hint="set tie_word_embeddings to false in config.json if the head is its own",
            )


def _rows(stored: _Stored, first: int, count: int) -> Tensor:
    """Rows of a tensor, `count` of them from `first` on, or those that there are."""
    # Opened for each: a tensor lies in the file's mapping, whose pages count as ours until it is gone.
    with safe_open(stored.file, framework="pt") as reader:
        if (first, count) == (0, stored.shape[0]):
            return reader.get_tensor(stored.name)  # type: ignore[no-any-return]
        return reader.get_slice(stored.name)[first : first + count]  # type: ignore[no-any-return]


def _check_no_adapter(path: Path) -> None:
    if not (path / "adapter_config.json").exists():
        return
    if (path / "config.json").exists():
        raise UnsupportedError(
            "there is an adapter in the folder of the model, and transformers would load both",
            where=path / "adapter_config.json",
            hint="move adapter_config.json and adapter_model.safetensors into a folder of their own, build the model, "
            "and add the adapter to the bundle",
        )
    raise CheckpointError(
        "this folder holds an adapter, not a model",
        where=path,
        hint="build the model that adapter_config.json names as base_model_name_or_path, then add the adapter",
    )


def _find_tensors(path: Path) -> dict[str, _Stored]:
    """Every tensor by its name without `model.`, file by file: of the files that transformers reads, no others."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return _read_files([single])
    if not index.is_file():
        raise CheckpointError(
            "there is neither model.safetensors nor model.safetensors.index.json",
            where=path,
            hint="weights in other files can be saved again with transformers' save_pretrained",
        )
    listed = _read_index(index)
    found = _read_files(sorted({path / file for file in listed.values()}))
    places = {(stored.name, stored.file) for stored in found.values()}
    left_over = {name for name in listed if name.endswith(_RECOMPUTED)}
    if missing := sorted(
        name for name, file in listed.items() if (name, path / file) not in places and name not in left_over
    ):
        raise CheckpointError(
            f"the index says that {missing[0]} is in {listed[missing[0]]}, but that file does not hold it",
            where=index,
            hint="download the folder again",
        )
    return found


def _read_files(files: Sequence[Path]) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for file in files:
        for stored in _read_header(file):
            name = stored.name.removeprefix("model.")
            if name in found:
                raise CheckpointError(
                    f"tensor {name} is there twice",
                    where=file,
                    hint=f"keep one of the two: the other is in {found[name].file.name}",
                )
            found[name] = stored
    return {name: stored for name, stored in found.items() if not name.endswith(_RECOMPUTED)}


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. CheckpointError: this is no index, or it names files outside of the folder."""
    listed = read_object(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(file, str) for file in listed.values())
    ):
        raise CheckpointError("is not an index of shards", where=path, hint=DAMAGED)
    for file in listed.values():
        # By its words alone: in a download cache, files of the folder are links to places outside.
        if Path(file).is_absolute() or ".." in Path(file).parts or "\0" in file or not file:
            raise CheckpointError(
                f"the index names {file!r}, which is not a file of this folder", where=path, hint=DAMAGED
            )
    return listed


def _read_header(file: Path) -> list[_Stored]:
    stored = []
    try:
        with safe_open(file, framework="pt") as reader:
            for name in sorted(reader.keys()):
                header = reader.get_slice(name)
                if header.get_dtype() not in _FLOATS and not name.endswith(_RECOMPUTED):
                    raise UnsupportedError(
                        f"tensor {name} has dtype {header.get_dtype()}",
                        where=file,
                        hint="give the checkpoint before it was quantized: float32, bfloat16 or float16",
                    )
                stored.append(_Stored(file=file, name=name, shape=tuple(header.get_shape())))
    except FileNotFoundError:
        raise CheckpointError("the shard is missing", where=file, hint="download it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"is not a whole safetensors file: {error}", where=file, hint=damaged(file)
        ) from None
    return stored
