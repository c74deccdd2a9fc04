"""Adapters of llama.cpp: PEFT's logits on the same matrices, or a refusal in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from adapter_formats import (
    CONFIG,
    as_gguf,
    equal,
    refused,
)
from peft import LoraConfig
from peft_oracle import Oracle
from transformers import LlamaConfig

from bedplate.errors import AdapterError, BedplateError, UnsupportedError
from bedplate.model.adapter import read_adapter

Q8 = gguf.GGMLQuantizationType.Q8_0


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_of_llama_cpp(
    oracle: Oracle, peft: Path, peft_q: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    adapter = equal(oracle, as_gguf(peft, tmp_path / "all.gguf", config), peft)
    assert (adapter.format, adapter.rank, adapter.alpha) == ("gguf", 4, 6.0)
    equal(oracle, as_gguf(peft_q, tmp_path / "q.gguf", config), peft_q)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16, Q8])
def test_values_of_other_types_are_unpacked(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    exact, stored = (
        oracle.read(as_gguf(peft, tmp_path / f"{of.name}.gguf", config, kind=of))
        for of in (gguf.GGMLQuantizationType.F32, kind)
    )
    for (path, a, b), (_, a_stored, b_stored) in zip(exact.matrices(), stored.matrices(), strict=True):
        assert np.abs(a - a_stored).max() < 0.02 * np.abs(a).max(), path
        assert np.abs(b - b_stored).max() < 0.02 * np.abs(b).max(), path


def test_a_rank_of_its_own_has_a_factor_of_its_own(
    oracle: Oracle, config: LlamaConfig, tmp_path: Path
) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    peft = oracle.save(tmp_path / "peft", lora)
    equal(oracle, as_gguf(peft, tmp_path / "a.gguf", config), peft)


def test_an_activated_lora(oracle: Oracle, config: LlamaConfig, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[42, 7], task_type="CAUSAL_LM"
    )
    peft = oracle.save(tmp_path / "peft", lora)
    fields = {"adapter.alora.invocation_tokens": [42, 7]}
    adapter = equal(oracle, as_gguf(peft, tmp_path / "a.gguf", config, fields=fields), peft)
    assert adapter.invocation == (42, 7)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_an_alpha_the_factor_is_one(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path, alpha: float | None
) -> None:
    file = as_gguf(peft, tmp_path / "a.gguf", config, fields={"adapter.lora.alpha": alpha})
    plain = Path(shutil.copytree(peft, tmp_path / "plain"))
    edit(plain / CONFIG, lora_alpha=4)
    equal(oracle, file, plain)


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"general.type": "model"}, AdapterError, "is a model, not an adapter"),
        ({"general.type": None}, AdapterError, "is a model, not an adapter"),
        ({"general.type": "imatrix"}, AdapterError, 'is a GGUF of type "imatrix"'),
        ({"adapter.type": "control_vector"}, UnsupportedError, 'adapter.type = "control_vector"'),
        ({"adapter.type": None}, UnsupportedError, "adapter.type = null"),
        (
            {"general.architecture": "qwen2"},
            AdapterError,
            'architecture "qwen2", but the bundle\'s model is "llama"',
        ),
        ({"adapter.alora.invocation_tokens": 5}, AdapterError, "must be a list of token ids, got 5"),
        ({"adapter.alora.invocation_tokens": [5, 320]}, AdapterError, "its invocation has the token 320"),
        ({"adapter.lora.next_years": 1}, UnsupportedError, "adapter.lora.next_years = 1"),
        ({"adapter.lora.alpha": "8"}, AdapterError, 'alpha must be a number, got "8"'),
        ({"adapter.lora.alpha": float("nan")}, AdapterError, "alpha must be a number"),
    ],
    ids=str,
)
def test_fields_of_a_gguf_that_are_refused(
    oracle: Oracle,
    peft: Path,
    config: LlamaConfig,
    tmp_path: Path,
    fields: dict[str, Any],
    kind: type[BedplateError],
    says: str,
) -> None:
    refused(oracle, as_gguf(peft, tmp_path / "a.gguf", config, fields=fields), kind, says)


def test_a_head_that_is_adapted(oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path) -> None:
    """llama.cpp knows a head only in a model whose head is not the embedding."""
    a, b = np.ones((4, 64), np.float32), np.full((320, 4), 2, np.float32)
    extra = {"output.weight.lora_a": a, "output.weight.lora_b": b}
    file = as_gguf(peft, tmp_path / "head.gguf", config, extra=extra)
    untied = dataclasses.replace(oracle.spec, tied_head=False)
    pair = read_adapter(file, untied).pairs[None, "lm_head"]
    assert (pair.a == a).all() and (pair.b == b).all() and pair.scale == 6 / 4
    refused(oracle, file, UnsupportedError, "a LoRA on the head")


@pytest.mark.parametrize(
    ("name", "shape", "kind", "says"),
    [
        ("token_embd.weight.lora_a", (64, 4), UnsupportedError, "a LoRA on the embedding table"),
        ("output.weight.lora_a", (4, 64), UnsupportedError, "a LoRA on the head"),
        ("blk.0.attn_norm.weight", (64,), UnsupportedError, "trained norms"),
        ("output_norm.weight", (64,), UnsupportedError, "trained norms"),
        ("blk.0.ffn_gate_exps.weight.lora_a", (4, 64), UnsupportedError, "a LoRA on experts"),
        ("blk.0.attn_qkv.weight.lora_a", (4, 64), UnsupportedError, "a linear that this model does not have"),
        (
            "blk.7.attn_q.weight.lora_a",
            (4, 64),
            AdapterError,
            r"lora_B of layers\.7\.self_attn\.q_proj is miss",
        ),
    ],
)
def test_tensors_of_a_gguf_that_are_refused(
    oracle: Oracle,
    peft: Path,
    config: LlamaConfig,
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: type[BedplateError],
    says: str,
) -> None:
    file = as_gguf(peft, tmp_path / "a.gguf", config, extra={name: np.ones(shape, np.float32)})
    refused(oracle, file, kind, says)


def test_a_prompt_prefix_is_told(oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path) -> None:
    fields = {"adapter.lora.prompt_prefix": "Task:", "adapter.lora.task_name": "tasks"}
    adapter = equal(oracle, as_gguf(peft, tmp_path / "a.gguf", config, fields=fields), peft)
    assert len(adapter.warnings) == 1 and '"Task:"' in adapter.warnings[0]


def test_a_damaged_gguf(oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path) -> None:
    file = as_gguf(peft, tmp_path / "a.gguf", config)
    data = file.read_bytes()
    for keep in (4, 7, 30, 200, 1000, 5000, len(data) // 2, len(data) - 64):
        file.write_bytes(data[:keep])
        refused(oracle, file, AdapterError, "is not a whole GGUF file|is a model, not an adapter")
    file.write_bytes(b"GGML" + data[4:])
    refused(oracle, file, AdapterError, "is a file, but not a GGUF")


def test_a_folder_with_a_gguf_in_it(oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = as_gguf(peft, folder / "a.gguf", config)
    assert str(file) in str(refused(oracle, folder, AdapterError, "but there is a GGUF file").hint)
