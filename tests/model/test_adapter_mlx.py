"""Adapters of MLX-LM: PEFT's logits on the same matrices, or a refusal in words."""

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
    as_mlx,
    equal,
    mlx_config,
    refused,
)
from peft import LoraConfig
from peft_oracle import Oracle
from safetensors.torch import load_file, save_file

from bedplate.errors import AdapterError, BedplateError, UnsupportedError


def test_an_adapter_of_mlx(oracle: Oracle, peft: Path, peft_q: Path, tmp_path: Path) -> None:
    adapter = equal(oracle, as_mlx(peft, tmp_path / "all"), peft)
    assert (adapter.format, adapter.rank, adapter.alpha) == ("mlx", 4, 6.0)
    equal(oracle, as_mlx(peft_q, tmp_path / "last", num_layers=2), peft_q)
    for count in (-1, 0, 3, 100):
        equal(oracle, as_mlx(peft_q, tmp_path / f"of{count}", num_layers=count), peft_q)


@pytest.mark.parametrize(
    "parameters",
    [
        {"keys": None},
        {"keys": ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]},
        {"keys": [f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 2) for name in "qk"]},
        {"alpha": 3},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_parameters_of_mlx_that_change_nothing(
    oracle: Oracle, peft_q: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    of_rank_3 = {"rank": 3, "dropout": 0.0, "scale": 2.0, **parameters}
    equal(oracle, as_mlx(peft_q, tmp_path / "mlx", num_layers=2, lora_parameters=of_rank_3), peft_q)


def test_a_config_of_an_older_mlx(oracle: Oracle, peft: Path, tmp_path: Path) -> None:
    folder = as_mlx(peft, tmp_path / "mlx")
    fields = mlx_config(peft, lora_layers=3)
    del fields["fine_tune_type"], fields["num_layers"]
    (folder / CONFIG).write_text(json.dumps(fields))
    equal(oracle, folder, peft)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (
            {"fine_tune_type": "dora"},
            AdapterError,
            r'fine_tune_type is "dora", but the weights hold no magnitude',
        ),
        ({"fine_tune_type": "full"}, UnsupportedError, 'fine_tune_type = "full" .*trained in full'),
        ({"fine_tune_type": 3}, UnsupportedError, "fine_tune_type = 3"),
        ({"num_layers": 2}, AdapterError, "num_layers = 2 adapts layers 1 to 2 .* of layer 0"),
        ({"num_layers": "all"}, AdapterError, "num_layers must be an integer"),
        ({"lora_parameters": None}, AdapterError, "lora_parameters is null"),
        ({"lora_parameters": {"rank": 4, "dropout": 0}}, AdapterError, "scale must be a number, got null"),
        ({"lora_parameters": {"rank": 4, "scale": True}}, AdapterError, "scale must be a number, got true"),
        (
            {"lora_parameters": {"rank": 8, "scale": 1}},
            AdapterError,
            r"gives it rank 8 \(lora_parameters.rank\)",
        ),
        ({"lora_parameters": {"rank": "4", "scale": 1}}, AdapterError, "rank must be a positive integer"),
        (
            {"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16}},
            UnsupportedError,
            "alpha = 16 beside scale = 10.0",
        ),
        (
            {"lora_parameters": {"rank": 4, "scale": 1, "keys": ["self_attn.q_proj"]}},
            AdapterError,
            "which lora_parameters.keys does not name",
        ),
        ({"lora_parameters": {"rank": 4, "scale": 1, "keys": "q"}}, AdapterError, "keys must be a list"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "new": 1}}, UnsupportedError, "lora_parameters.new"),
    ],
    ids=str,
)
def test_a_config_of_mlx_that_is_refused(
    oracle: Oracle, peft: Path, tmp_path: Path, changes: dict[str, Any], kind: type[BedplateError], says: str
) -> None:
    refused(oracle, as_mlx(peft, tmp_path / "mlx", **changes), kind, says)


def test_dora_of_mlx(oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_dora=True)
    peft = oracle.save(tmp_path / "peft", config)
    folder = as_mlx(peft, tmp_path / "mlx", fine_tune_type="dora")
    equal(oracle, folder, peft)
    (folder / CONFIG).write_text(json.dumps(mlx_config(peft)))
    refused(oracle, folder, AdapterError, 'fine_tune_type is "lora", but the weights hold a magnitude')


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.embed_tokens.m", "is an embedding table"),
        ("model.embed_tokens.lora_a", "a LoRA on the embedding table"),
        ("lm_head.lora_a", "a LoRA on the head"),
        ("model.layers.0.self_attn.q_proj.weight", "weights of the base model"),
        ("model.layers.0.input_layernorm.weight", "trained norms"),
    ],
)
def test_what_mlx_trains_and_bedplate_does_not_take(
    oracle: Oracle, peft: Path, tmp_path: Path, name: str, says: str
) -> None:
    folder = as_mlx(peft, tmp_path / "mlx")
    file = folder / "adapters.safetensors"
    save_file({**load_file(file), name: torch.ones(64)}, file)
    refused(oracle, folder, UnsupportedError, says)


def test_the_config_says_whose_a_folder_is(oracle: Oracle, peft: Path, peft_q: Path, tmp_path: Path) -> None:
    """Both weights are there: each tool reads its own."""
    folder = as_mlx(peft, tmp_path / "both")
    shutil.copy(peft_q / WEIGHTS, folder)
    assert equal(oracle, folder, peft).format == "mlx"
    shutil.copy(peft_q / CONFIG, folder)
    assert equal(oracle, folder, peft_q).format == "peft"
    (folder / WEIGHTS).unlink()
    refused(oracle, folder, AdapterError, f"there is no {WEIGHTS}")
