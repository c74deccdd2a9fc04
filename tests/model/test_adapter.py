"""PEFT adapters: read exactly as PEFT reads them, and no field or tensor that would be lost is passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from small_spec import LINEARS
from torch import Tensor
from toy import ALL_LINEARS, reference, save_adapter

from bedplate.errors import AdapterError, BedplateError, NotFoundError, UnsupportedError
from bedplate.model.adapter import Adapter, read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.spec import ModelSpec, linear_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def spec(toy_model: Path) -> ModelSpec:
    return open_checkpoint(toy_model).spec


@pytest.fixture
def folder(toy_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the adapter `all` to spoil."""
    return Path(shutil.copytree(toy_adapters["all"], tmp_path / "adapter"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)


def refused(
    folder: Path, spec: ModelSpec, kind: type[BedplateError], says: str, *, file: str | None = None
) -> BedplateError:
    with pytest.raises(kind, match=says) as caught:
        read_adapter(folder, spec)
    assert caught.value.where is not None and caught.value.where.startswith(str(folder))
    assert file is None or caught.value.where == str(folder / file)
    assert caught.value.hint
    return caught.value


def by_path(adapter: Adapter) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    return {path: (a, b) for path, a, b in adapter.matrices()}


def equals_peft(folder: Path, model: Path, spec: ModelSpec) -> None:
    """A and B are those of PEFT's own modules, with its scaling in B."""
    ours = by_path(read_adapter(folder, spec))
    theirs = {
        name.removeprefix("base_model.model.model."): module
        for name, module in reference(model, folder).named_modules()
        if hasattr(module, "lora_A")
    }
    assert set(ours) == set(theirs)
    for path, (a, b) in ours.items():
        module = theirs[path]
        expected = module.lora_B["default"].weight.detach() * module.scaling["default"]
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, module.lora_A["default"].weight.detach().numpy())
        np.testing.assert_allclose(b, expected.numpy(), rtol=1e-7)  # one float32 product


@pytest.mark.parametrize("name", ["all", "all2", "qv"])
def test_matrices_are_those_of_peft(
    name: str, toy_adapters: dict[str, Path], toy_model: Path, spec: ModelSpec
) -> None:
    equals_peft(toy_adapters[name], toy_model, spec)


def test_a_scaling_that_is_no_power_of_two(toy_model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", toy_model, seed=1, rank=3)
    edit_config(folder, lora_alpha=7)
    equals_peft(folder, toy_model, spec)
    assert (read_adapter(folder, spec).rank, read_adapter(folder, spec).alpha) == (3, 7.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(
    dtype: torch.dtype, folder: Path, toy_model: Path, spec: ModelSpec
) -> None:
    edit_weights(folder, lambda tensors: tensors.update({n: v.to(dtype) for n, v in tensors.items()}))
    equals_peft(folder, toy_model, spec)
    a, _ = by_path(read_adapter(folder, spec))["layers.0.self_attn.q_proj"]
    assert np.array_equal(a, load_file(folder / WEIGHTS)[FIRST].float().numpy())


def test_ranks_are_in_the_order_of_the_model(
    toy_adapters: dict[str, Path], folder: Path, spec: ModelSpec
) -> None:
    assert read_adapter(toy_adapters["qv"], spec).ranks == {"self_attn.q_proj": 8, "self_attn.v_proj": 8}
    edit_config(folder, target_modules=ALL_LINEARS[::-1])
    assert list(read_adapter(folder, spec).ranks) == list(LINEARS)


def test_shapes_are_those_of_the_decoder(spec: ModelSpec) -> None:
    decoder = Decoder(spec, max_context=1, device="meta")
    found = {name: tuple(decoder.layers[0].get_submodule(name).weight.shape) for name in LINEARS}
    assert linear_shapes(spec) == found and list(linear_shapes(spec)) == list(LINEARS)


def test_the_fingerprint_is_of_both_files(
    folder: Path, toy_adapters: dict[str, Path], spec: ModelSpec
) -> None:
    seen = {read_adapter(path, spec).fingerprint for path in (folder, toy_adapters["all"])}
    assert len(seen) == 1
    edit_config(folder, lora_alpha=9)
    seen.add(read_adapter(folder, spec).fingerprint)
    edit_weights(folder, lambda tensors: tensors[FIRST][0, 0].add_(1))
    seen.add(read_adapter(folder, spec).fingerprint)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_next_years_lora": True}, "use_next_years_lora = true"),
        ({"next_years_scale": 0}, "next_years_scale = 0"),
        ({"next_years_scale": 0.5}, "next_years_scale = 0.5"),
        ({"next_years_config": {"a": list(range(100))}}, "next_years_config = .*…"),
    ],
    ids=str,
)
def test_an_unknown_field_with_a_value_is_refused(
    fields: dict[str, Any], says: str, folder: Path, spec: ModelSpec
) -> None:
    edit_config(folder, **fields)
    error = refused(folder, spec, UnsupportedError, says, file=CONFIG)
    assert "bedplate does not know this field: if it has no effect at inference, remove it" in str(error.hint)


@pytest.mark.parametrize("value", [None, False, {}, [], ""], ids=repr)
def test_an_unknown_field_that_is_off_is_no_matter(value: Any, folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, use_next_years_lora=value)
    read_adapter(folder, spec)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        LoHaConfig(target_modules=["q_proj"]),
        OFTConfig(target_modules=["q_proj"]),
        VeraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_another_peft_type_is_refused_by_its_name(config: PeftConfig, folder: Path, spec: ModelSpec) -> None:
    assert config.peft_type is not None
    (folder / CONFIG).unlink()
    config.save_pretrained(folder)
    refused(folder, spec, UnsupportedError, f'peft_type = "{config.peft_type.value}"', file=CONFIG)


def test_a_config_without_a_type(folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, peft_type=None)
    refused(folder, spec, UnsupportedError, "peft_type = null", file=CONFIG)


def test_an_adapter_of_a_wider_model(folder: Path, spec: ModelSpec) -> None:
    wider = {FIRST: torch.zeros(4, 128)}
    edit_weights(folder, lambda tensors: tensors.update(wider))
    says = r"lora_A of layers\.0\.self_attn\.q_proj has shape \(4, 128\), .* need \(4, 64\)"
    refused(folder, spec, AdapterError, says, file=WEIGHTS)


def test_weights_of_another_rank_than_the_config(folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, r=8)
    says = r"lora_A of .* has shape \(4, 96\), but the config gives it rank 8 \(r\)"
    refused(folder, spec, AdapterError, says, file=WEIGHTS)


def test_an_adapter_of_a_deeper_model(folder: Path, spec: ModelSpec) -> None:
    edit_weights(
        folder, lambda t: t.update({n.replace("layers.0", "layers.3"): t[n].clone() for n in list(t)})
    )
    refused(folder, spec, AdapterError, r"layers\.3\.\S+, which the model does not have")


def test_some_layers(folder: Path, spec: ModelSpec) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "layers.2." in name]:
            del tensors[name]

    edit_weights(folder, drop)
    matrices = by_path(read_adapter(folder, spec))
    assert all(a.any() and b.any() for path, (a, b) in matrices.items() if "layers.2." not in path)
    assert not any(a.any() or b.any() for path, (a, b) in matrices.items() if "layers.2." in path)


def test_keys_of_a_linear_that_the_model_lacks(folder: Path, spec: ModelSpec) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for half in (FIRST, FIRST.replace("lora_A", "lora_B")):
            tensors[half.replace("q_proj", "qkv_proj")] = tensors.pop(half)

    edit_weights(folder, rename)
    refused(folder, spec, AdapterError, r"layers\.0\.self_attn\.qkv_proj, which the model does not have")


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half(half: str, folder: Path, spec: ModelSpec) -> None:
    edit_weights(folder, lambda tensors: tensors.pop(FIRST.replace("lora_A", f"lora_{half}")))
    says = rf"lora_{half} of layers\.0\.self_attn\.q_proj is missing"
    refused(folder, spec, AdapterError, says, file=WEIGHTS)


def test_no_tensors_at_all(folder: Path, spec: ModelSpec) -> None:
    save_file({}, folder / WEIGHTS)
    refused(folder, spec, AdapterError, "adapts nothing", file=WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value: float, folder: Path, spec: ModelSpec) -> None:
    edit_weights(folder, lambda tensors: tensors[FIRST][1, 2].fill_(value))
    refused(folder, spec, AdapterError, f"{FIRST} holds NaN or infinity", file=WEIGHTS)


def test_integers(folder: Path, spec: ModelSpec) -> None:
    edit_weights(folder, lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.int8)}))
    refused(folder, spec, AdapterError, "dtype I8", file=WEIGHTS)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(keep: int, folder: Path, spec: ModelSpec) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    refused(folder, spec, AdapterError, "not a whole safetensors file", file=WEIGHTS)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(file: str, folder: Path, spec: ModelSpec) -> None:
    (folder / file).unlink()
    refused(folder, spec, AdapterError, f"there is no {file}")


def hint_of(path: Path, spec: ModelSpec) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, spec)
    return str(caught.value.hint)


def test_a_folder_that_is_no_adapter_says_where_one_is(
    folder: Path, spec: ModelSpec, toy_model: Path, tmp_path: Path
) -> None:
    assert "bedplate build" in hint_of(toy_model, spec)
    run = tmp_path / "run"
    shutil.copytree(folder, run / "checkpoint-5")
    assert str(run / "checkpoint-5") in hint_of(run, spec), "the output of a training program"


def test_a_pointer_of_git_lfs_is_no_damaged_file(folder: Path, spec: ModelSpec) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    assert "git lfs pull" in hint_of(folder, spec)


def test_no_such_adapter(spec: ModelSpec, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", spec, NotFoundError, "no such file or folder")
