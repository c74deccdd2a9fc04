"""A GGUF of the `llama` architecture as a checkpoint: llama.cpp's names, layout and fields in Hugging Face's terms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.config import spec_from_config
from bedplate.model.fields import Fields, shown
from bedplate.model.gguf_names import LAYER_LINEARS
from bedplate.model.rotary_order import in_our_order, turned_heads
from bedplate.spec import RotaryRows, parameter_shapes

_LAYER_NAMES = {
    **LAYER_LINEARS,
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
}
_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "intermediate_size": "llama.feed_forward_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
_HEAD_WIDTHS = ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")
# Values with which a field says what is the case anyway.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "llama.attention.causal": (True,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.rope.scaling.type": ("none",),
    "llama.use_parallel_residual": (False,),
}
_USED = {*_FIELDS.values(), *_HEAD_WIDTHS, "llama.vocab_size"}
_USE_FOLDER = "if the model is of the Llama family, use its Hugging Face folder"


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
        raise CheckpointError(
            f"holds a field that is damaged: {error}", where=path, hint="download it again"
        ) from None


class GgufFile:
    """A `Checkpoint`. Raises CheckpointError or UnsupportedError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        reader = open_gguf(path)
        self.fields = gguf_fields(reader, path)
        names = {tensor.name for tensor in reader.tensors}
        self.spec = spec_from_config(_config(self.fields, names, path), where=path)
        self._stored = {_name(tensor.name, path): tensor for tensor in reader.tensors}

    def found(self) -> dict[str, tuple[int, ...]]:
        # The format lists dimensions from the innermost on.
        return {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._stored.items()
        }

    def wanted(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.spec)

    def names(self) -> list[str]:
        return list(self._stored)

    def tensor(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        heads = turned_heads(".".join(name.split(".")[2:-1]), self.spec)
        # Of this architecture GGUF has the rows of q and k that turn together side by side.
        rows = RotaryRows(width=self.spec.head_dim, interleaved=True)
        return in_our_order(tensor, heads, rows) if heads else tensor


def _name(name: str, path: Path) -> str:
    match name.split("."):
        case ["blk", index, kind, leaf] if kind in _LAYER_NAMES:
            return f"layers.{index}.{_LAYER_NAMES[kind]}.{leaf}"
        case [kind, leaf] if kind in _NAMES:
            return f"{_NAMES[kind]}.{leaf}"
    raise UnsupportedError(f"tensor {name} has no place in the decoder", where=path, hint=_USE_FOLDER)


def _config(fields: Mapping[str, Any], names: Collection[str], path: Path) -> dict[str, Any]:
    """What the config.json of a file with these fields and tensors would say."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(
            f"GGUF architecture {architecture!r} is not supported", where=path, hint="supported: llama"
        )
    for name in sorted(name for name in fields if name.startswith("llama.") and name not in _USED):
        allowed = _NO_EFFECT.get(name, ())
        if not any(type(fields[name]) is type(value) and fields[name] == value for value in allowed):
            raise UnsupportedError(
                f"{name} = {shown(fields[name])} is not supported", where=path, hint=_USE_FOLDER
            )
    widths = {Fields(fields, path).count(name) for name in _HEAD_WIDTHS if name in fields}
    if len(widths) > 1:
        raise UnsupportedError(
            f"{', '.join(_HEAD_WIDTHS)} differ: {sorted(widths)}", where=path, hint=_USE_FOLDER
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    return {
        **{hugging_face: fields[name] for hugging_face, name in _FIELDS.items() if name in fields},
        "model_type": "llama",
        "head_dim": next(iter(widths), None),
        "vocab_size": fields.get("llama.vocab_size") or (len(tokens) if isinstance(tokens, list) else None),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": any(name.endswith("attn_q.bias") for name in names),
    }
