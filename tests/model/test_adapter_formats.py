"""Adapters of other tools, each in its own form: PEFT's logits on the same matrices, or a refusal in words."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from adapter_formats import (
    CONFIG,
    WEIGHTS,
    as_bin,
    as_gguf,
    as_mlx,
    as_torchtune,
    mlx_config,
    peft_config,
    tensors_of,
)
from peft import LoraConfig
from peft_oracle import TOLERANCE, Oracle
from safetensors.torch import load_file, save_file
from toy import ALL_LINEARS
from transformers import LlamaConfig

from bedplate.errors import AdapterError, BedplateError, UnsupportedError
from bedplate.model.adapter import Adapter

Q8 = gguf.GGMLQuantizationType.Q8_0
LORA_A = "blk.0.attn_q.weight.lora_a"


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture(scope="module")
def config(oracle: Oracle) -> LlamaConfig:
    return oracle.model.config  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def peft(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All linears, rank 4, and a factor that is neither 1 nor what a default would give."""
    folder = tmp_path_factory.mktemp("formats") / "peft"
    return oracle.save(folder, LoraConfig(r=4, lora_alpha=6, target_modules=ALL_LINEARS))


@pytest.fixture(scope="module")
def peft_q(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 3 on the last two layers' q and k: what is permuted, and is not everywhere."""
    folder = tmp_path_factory.mktemp("formats") / "q"
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj"], layers_to_transform=[1, 2])
    return oracle.save(folder, lora)


def equal(oracle: Oracle, made: Path, peft: Path, *, tolerance: float = TOLERANCE) -> Adapter:
    """What bedplate reads from `made` is what PEFT computes from `peft`."""
    adapter = oracle.read(made)
    expected = oracle.peft(peft)
    torch.testing.assert_close(oracle.merged(adapter), expected, rtol=0, atol=tolerance)
    assert float((expected - oracle.base).abs().max()) > 20 * tolerance
    return adapter


def refused(oracle: Oracle, made: Path, kind: type[BedplateError], says: str) -> BedplateError:
    with pytest.raises(kind, match=says) as caught:
        oracle.read(made)
    assert caught.value.where is not None and caught.value.where.startswith(str(made))
    assert caught.value.hint
    return caught.value


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- PEFT's .bin --------------------------------------------------------------------------------------------------


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


# --- torchtune ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layers.0.attn.q_proj.magnitude", "is DoRA"),
        ("output.lora_a.weight", "a LoRA on the head"),
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


# --- MLX-LM -------------------------------------------------------------------------------------------------------


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
        ({"fine_tune_type": "dora"}, UnsupportedError, r'fine_tune_type = "dora" \(DoRA\)'),
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


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_proj.m", "is DoRA"),
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


# --- llama.cpp ----------------------------------------------------------------------------------------------------


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
            'architecture "qwen2", and the bundle\'s is "llama"',
        ),
        ({"adapter.alora.invocation_tokens": [5, 6]}, UnsupportedError, r"\[5, 6\] \(activated LoRA\)"),
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
    refused(oracle, file, AdapterError, "is a file, and not a GGUF")


def test_a_folder_with_a_gguf_in_it(oracle: Oracle, peft: Path, config: LlamaConfig, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = as_gguf(peft, folder / "a.gguf", config)
    assert str(file) in str(refused(oracle, folder, AdapterError, "but a GGUF").hint)


# --- All ----------------------------------------------------------------------------------------------------------


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
    got = oracle.merged(oracle.read(folder))
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
from bedplate.model.spec import spec_from_dict
assert len(list(read_adapter(Path(sys.argv[1]), spec_from_dict(json.loads(sys.argv[2]))).matrices())) == 21
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
