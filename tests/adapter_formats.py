"""One adapter in the form of each tool: files written from the tensors of an adapter that PEFT saved.

Each tool's names, shapes, order of rows and config are as its own sources write them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_edit import finish
from peft_oracle import TOLERANCE, Oracle
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from bedplate.errors import BedplateError
from bedplate.model.adapter import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model."
TORCHTUNE = {
    "self_attn": "attn",
    "o_proj": "output_proj",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
}
GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def peft_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def tensors_of(peft: Path) -> dict[str, Tensor]:
    """By PEFT's names without what stands before `layers`."""
    return {name.removeprefix(_PREFIX): value for name, value in load_file(peft / WEIGHTS).items()}


def interleaved(name: str, value: Tensor, config: LlamaConfig) -> Tensor:
    """Rows of q and k as Meta has them, where the tensor is a B or magnitudes."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    linear, half = name.removesuffix(".weight").split(".")[-2:]
    if linear not in heads or half not in ("lora_B", "lora_magnitude_vector"):
        return value
    halves = value.view(heads[linear], 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape).contiguous()


def as_bin(peft: Path, folder: Path) -> Path:
    """As PEFT saves with safe_serialization=False."""
    folder.mkdir()
    shutil.copy(peft / CONFIG, folder)
    torch.save(load_file(peft / WEIGHTS), folder / "adapter_model.bin")
    return folder


def as_torchtune(peft: Path, folder: Path, config: LlamaConfig) -> Path:
    """`adapter_model.pt` in torchtune's names, and the config in PEFT's that it writes beside it."""
    folder.mkdir()
    tensors = {}
    for name, value in tensors_of(peft).items():
        own = ".".join(TORCHTUNE.get(part, part) for part in name.split("."))
        tensors[own] = interleaved(name, value, config)
    torch.save(tensors, folder / "adapter_model.pt")
    fields = peft_config(peft)
    kept = {name: fields[name] for name in ("r", "lora_alpha", "target_modules", "peft_type")}
    (folder / CONFIG).write_text(json.dumps({**kept, "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}))
    return folder


def mlx_config(peft: Path, **changes: Any) -> dict[str, Any]:
    """What MLX-LM writes: every option of its training run."""
    fields = peft_config(peft)
    return {
        "adapter_path": "adapters",
        "batch_size": 4,
        "config": None,
        "data": "data",
        "fine_tune_type": "lora",
        "grad_checkpoint": False,
        "iters": 1000,
        "learning_rate": 1e-05,
        "lora_parameters": {
            "rank": fields["r"],
            "dropout": 0.0,
            "scale": fields["lora_alpha"] / fields["r"],
        },
        "lr_schedule": None,
        "mask_prompt": False,
        "max_seq_length": 2048,
        "model": "mlx-community/Llama-3.2-1B",
        "num_layers": 16,
        "optimizer": "adam",
        "optimizer_config": {"adam": {}},
        "resume_adapter_file": None,
        "save_every": 100,
        "seed": 0,
        "steps_per_eval": 200,
        "steps_per_report": 10,
        "test": False,
        "test_batches": 500,
        "train": True,
        "val_batches": 25,
        **changes,
    }


def as_mlx(peft: Path, folder: Path, **changes: Any) -> Path:
    """`adapters.safetensors`: A is [in, rank] and B [rank, out]."""
    folder.mkdir()
    tensors = {}
    for name, value in tensors_of(peft).items():
        path, _, half = name.removesuffix(".weight").rpartition(".")
        own = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}[half]
        tensors[f"model.{path}.{own}"] = value.T if value.ndim == 2 else value
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapters.safetensors")
    (folder / CONFIG).write_text(json.dumps(mlx_config(peft, **changes), indent=4))
    return folder


def as_gguf(
    peft: Path,
    file: Path,
    config: LlamaConfig,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """As llama.cpp's convert_lora_to_gguf.py writes it. fields: in place of its own; None leaves one out."""
    written: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": "An adapter",
        "adapter.lora.alpha": float(peft_config(peft)["lora_alpha"]),
        "general.quantization_version": 2,
        **(fields or {}),
    }
    writer = gguf.GGUFWriter(file, arch=written.pop("general.architecture"))
    for name, value in written.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, tensor in tensors_of(peft).items():
        _, layer, block, linear, half, _ = name.split(".")
        value = interleaved(name, tensor, config).numpy()
        own = f"blk.{layer}.{GGUF[f'{block}.{linear}']}.weight.{half.lower()}"
        # The converter leaves in float32 what a type has no blocks for.
        fits = value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        stored = kind if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(own, gguf.quants.quantize(value, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return file


def equal(oracle: Oracle, made: Path, peft: Path, *, tolerance: float = TOLERANCE) -> Adapter:
    """What bedplate reads from `made` is what PEFT computes from `peft`."""
    adapter = oracle.read(made)
    expected = oracle.peft(peft)
    torch.testing.assert_close(oracle.applied(adapter), expected, rtol=0, atol=tolerance)
    assert float((expected - oracle.base).abs().max()) > 20 * tolerance
    return adapter


def refused(oracle: Oracle, made: Path, kind: type[BedplateError], says: str) -> BedplateError:
    with pytest.raises(kind, match=says) as caught:
        oracle.read(made)
    assert caught.value.where is not None and caught.value.where.startswith(str(made))
    assert caught.value.hint
    return caught.value
