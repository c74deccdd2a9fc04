"""Adapters of torchtune in its own form: PEFT's logits on the same matrices, or a refusal in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_formats import (
    CONFIG,
    WEIGHTS,
    as_torchtune,
    equal,
    refused,
)
from peft import LoraConfig
from peft_oracle import Oracle
from transformers import LlamaConfig

from bedplate.errors import AdapterError, UnsupportedError


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_of_torchtune(
    oracle: Oracle, peft: Path, peft_q: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    adapter = equal(oracle, as_torchtune(peft, tmp_path / "all", config), peft)
    assert (adapter.format, adapter.rank, adapter.alpha) == ("torchtune", 4, 6.0)
    equal(oracle, as_torchtune(peft_q, tmp_path / "q", config), peft_q)


def test_a_checkpoint_of_an_epoch_and_torchtunes_own_names_in_the_config(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    folder = as_torchtune(peft, tmp_path / "epoch", config)
    (folder / "adapter_model.pt").rename(folder / "adapter_0.pt")
    edit(folder / CONFIG, target_modules=["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"])
    equal(oracle, folder, peft)
    shutil.copy(folder / "adapter_0.pt", folder / "adapter_1.pt")
    refused(oracle, folder, AdapterError, r"several adapter checkpoints: adapter_0\.pt, adapter_1\.pt")


def test_what_torchtune_has_converted_itself_comes_first(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    folder = as_torchtune(peft, tmp_path / "both", config)
    shutil.copy(peft / WEIGHTS, folder)
    assert equal(oracle, folder, peft).format == "peft"


def test_a_checkpoint_of_torchtune_without_a_config(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    folder = as_torchtune(peft, tmp_path / "bare", config)
    (folder / CONFIG).unlink()
    error = refused(oracle, folder, AdapterError, r"no adapter_config\.json.*does not tell the scale")
    assert "lora_alpha" in str(error.hint)


def test_dora_of_torchtune(oracle: Oracle, config: LlamaConfig, tmp_path: Path) -> None:
    """Its config does not speak of it."""
    peft = oracle.save(tmp_path / "peft", LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True))
    equal(oracle, as_torchtune(peft, tmp_path / "torchtune", config), peft)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tok_embeddings.weight", "an embedding table"),
        ("layers.0.sa_norm.scale", "is trained norms"),
        ("layers.0.attn.q_proj.weight", "weights of the base model"),
    ],
)
def test_what_torchtune_trains_and_bedplate_does_not_take(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path, name: str, says: str
) -> None:
    folder = as_torchtune(peft, tmp_path / "more", config)
    tensors = torch.load(folder / "adapter_model.pt", weights_only=True)
    torch.save({**tensors, name: torch.ones(64)}, folder / "adapter_model.pt")
    error = refused(oracle, folder, UnsupportedError, says)
    assert name in error.what and error.where == str(folder / "adapter_model.pt")


def test_an_adapter_of_torchtune_for_a_wider_model(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    folder = as_torchtune(peft, tmp_path / "wide", config)
    tensors = torch.load(folder / "adapter_model.pt", weights_only=True)
    name = "layers.0.attn.q_proj.lora_b.weight"
    torch.save({**tensors, name: torch.ones(256, 4)}, folder / "adapter_model.pt")
    refused(oracle, folder, AdapterError, r"has shape \(256, 4\)")
