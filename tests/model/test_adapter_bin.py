"""PEFT's older `.bin`: PEFT's logits, and no code in it ever runs."""

from __future__ import annotations

import collections
import copy
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_formats import (
    WEIGHTS,
    as_bin,
    equal,
    refused,
)
from peft import LoraConfig, get_peft_model
from peft_oracle import Oracle
from safetensors.torch import load_file

from bedplate.errors import AdapterError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_bin_of_peft(oracle: Oracle, peft: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = as_bin(peft, tmp_path / "bin")
    if dtype != torch.float32:
        tensors = {name: value.to(dtype) for name, value in load_file(peft / WEIGHTS).items()}
        torch.save(tensors, folder / "adapter_model.bin")
    adapter = equal(oracle, folder, folder)
    assert (adapter.format, adapter.alpha, adapter.rank) == ("peft", 6.0, 4)


def test_as_in_peft_a_bin_does_not_count_beside_safetensors(
    oracle: Oracle, peft: Path, tmp_path: Path
) -> None:
    folder = as_bin(peft, tmp_path / "both")
    (folder / "adapter_model.bin").write_bytes(b"of an older save")
    shutil.copy(peft / WEIGHTS, folder)
    equal(oracle, folder, peft)


@pytest.mark.parametrize(
    ("fields", "under_two_names"),
    [
        ({}, {"model.embed_tokens.weight", "lm_head.weight"}),
        (
            {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
            {"model.embed_tokens.lora_embedding_A", "lm_head.lora_B.weight"},
        ),
    ],
    ids=["saved", "adapted"],
)
def test_what_has_two_names_is_in_a_bin_once(
    fields: dict[str, Any], under_two_names: set[str], oracle: Oracle, tmp_path: Path
) -> None:
    """What an embedding and a head share, PEFT saves under both names."""
    config = LoraConfig(r=64, init_lora_weights=False, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(oracle.model), config)
        model.save_pretrained(tmp_path, safe_serialization=False, save_embedding_layers=True)
    tensors = torch.load(tmp_path / "adapter_model.bin")
    shared = {tensors[f"base_model.model.{name}"].data_ptr() for name in under_two_names}
    assert len(shared) == 1
    assert sum(value.nbytes for value in tensors.values()) > (tmp_path / "adapter_model.bin").stat().st_size
    oracle.assert_equal(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def huge() -> torch.Tensor:
    """4 bytes that claim to be 4 TB."""
    return torch.zeros(1).expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Bomb(), "cannot be read as tensors alone: it asks for posix.mkdir"),
        ({"a": Bomb()}, "cannot be read as tensors alone"),
        ([torch.ones(1)], "does not hold tensors by their names"),
        ({3: torch.ones(1)}, "does not hold tensors by their names"),
        ({"a": 3}, "a is no plain tensor"),
        ({"a": {"b": torch.ones(1)}}, "a is no plain tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.ones(2, device="meta")}, "a is no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.int8)}, "tensor a has dtype int8"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "tensor a has dtype complex64"),
        ({"a": torch.tensor([float("nan")])}, "tensor a holds NaN"),
        ({"a": huge()}, "claim more bytes than the file has, up to a"),
        (collections.OrderedDict(), "adapts nothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_bin_that_holds_more_than_tensors(
    oracle: Oracle, peft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = as_bin(peft, tmp_path / "bin")
    torch.save(content, folder / "adapter_model.bin")
    error = refused(oracle, folder, AdapterError, says)
    assert error.where == str(folder / "adapter_model.bin")
    assert not (tmp_path / "exploded").exists()
    assert "weights_only" not in str(error), "no advice to run what the file holds"


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_damaged_bin(oracle: Oracle, peft: Path, tmp_path: Path, keep: int) -> None:
    folder = as_bin(peft, tmp_path / "bin")
    data = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.bin").write_bytes(data[:keep])
    refused(oracle, folder, AdapterError, "cannot be read as tensors alone")


def test_a_plain_pickle(oracle: Oracle, peft: Path, tmp_path: Path) -> None:
    folder = as_bin(peft, tmp_path / "bin")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": [1]}))
    refused(oracle, folder, AdapterError, "cannot be read as tensors alone|no plain tensor")
