"""What holds for adapters of every tool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_formats import (
    CONFIG,
    WEIGHTS,
    as_bin,
    as_gguf,
    as_mlx,
    as_torchtune,
    peft_config,
    refused,
    tensors_of,
)
from peft_oracle import TOLERANCE, Oracle
from safetensors.torch import save_file
from transformers import LlamaConfig

from bedplate.errors import AdapterError, UnsupportedError


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_toy_tells_the_orders_of_rows_apart(
    oracle: Oracle, peft_q: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    """Rows that stay as they are in the file would give other logits."""
    folder = as_torchtune(peft_q, tmp_path / "torchtune", config)
    torch.save(
        {
            name.replace("self_attn", "attn").replace("lora_A", "lora_a").replace("lora_B", "lora_b"): value
            for name, value in tensors_of(peft_q).items()
        },
        folder / "adapter_model.pt",
    )
    got = oracle.applied(oracle.read(folder))
    assert float((got - oracle.peft(peft_q)).abs().max()) > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("make", "loads"),
    [
        (lambda peft, folder, config: peft, set()),
        (lambda peft, folder, config: as_mlx(peft, folder), set()),
        (as_gguf, {"gguf"}),
        (lambda peft, folder, config: as_bin(peft, folder), {"torch"}),
        (as_torchtune, {"torch"}),
    ],
    ids=["peft", "mlx", "gguf", "bin", "torchtune"],
)
def test_each_format_imports_only_what_reads_it(
    oracle: Oracle,
    peft: Path,
    config: LlamaConfig,
    tmp_path: Path,
    make: Callable[[Path, Path, LlamaConfig], Path],
    loads: set[str],
) -> None:
    made = make(peft, tmp_path / "made", config)
    script = """
import json, sys
from pathlib import Path
from bedplate.model.adapter import read_adapter
from bedplate.runtime.model_spec import decode_spec
assert len(list(read_adapter(Path(sys.argv[1]), decode_spec(json.loads(sys.argv[2]), "x")).matrices())) == 21
print(*sorted({"torch", "gguf"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, str(made), json.dumps(oracle.spec.to_dict())]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == loads


@pytest.mark.parametrize(
    ("make", "package", "install"),
    [
        (as_gguf, "gguf", "pip install gguf"),
        (lambda peft, folder, config: as_bin(peft, folder), "torch", "bedplate[build]"),
    ],
    ids=["gguf", "bin"],
)
def test_a_package_that_is_not_there_is_named(
    oracle: Oracle,
    peft: Path,
    config: LlamaConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path, LlamaConfig], Path],
    package: str,
    install: str,
) -> None:
    made = make(peft, tmp_path / "made", config)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(oracle, made, UnsupportedError, f"the Python package {package}")
    assert install in str(error.hint)


def test_without_tensors_there_is_no_adapter(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    empty = Path(shutil.copytree(peft, tmp_path / "empty"))
    save_file({}, empty / WEIGHTS)
    for made in (
        as_bin(empty, tmp_path / "bin"),
        as_torchtune(empty, tmp_path / "torchtune", config),
        as_mlx(empty, tmp_path / "mlx"),
        as_gguf(empty, tmp_path / "a.gguf", config),
    ):
        refused(oracle, made, AdapterError, "adapts nothing")


def test_other_bytes_have_another_fingerprint(
    oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    made = {
        "bin": as_bin(peft, tmp_path / "bin") / "adapter_model.bin",
        "torchtune": as_torchtune(peft, tmp_path / "torchtune", config) / CONFIG,
        "mlx": as_mlx(peft, tmp_path / "mlx") / CONFIG,
        "gguf": as_gguf(peft, tmp_path / "a.gguf", config),
    }
    for name, file in made.items():
        source = file if name == "gguf" else file.parent
        seen = {oracle.read(source).fingerprint}
        if name == "bin":
            tensors = torch.load(file, weights_only=True)
            torch.save({key: 2 * value for key, value in tensors.items()}, file)
        elif name == "gguf":
            as_gguf(peft, file, config, fields={"general.name": "Another"})
        else:
            edit(file, **{"model" if name == "mlx" else "base_model_name_or_path": "another"})
        seen.add(oracle.read(source).fingerprint)
        assert len(seen) == 2, name
    assert peft_config(peft)["lora_alpha"] == 6
