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
    EvaConfig,
    IA3Config,
    LoftQConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
)
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import ALL_LINEARS, reference, save_adapter

from bedplate.errors import AdapterError, BedplateError, NotFoundError, UnsupportedError
from bedplate.model.adapter import Adapter, read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import LAYER_LINEARS, Decoder
from bedplate.model.spec import ModelSpec, linear_shapes

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
    assert list(read_adapter(folder, spec).ranks) == list(LAYER_LINEARS)


def test_shapes_are_those_of_the_decoder(spec: ModelSpec) -> None:
    decoder = Decoder(spec, max_context=1, device="meta")
    found = {name: tuple(decoder.layers[0].get_submodule(name).weight.shape) for name in LAYER_LINEARS}
    assert linear_shapes(spec) == found and list(linear_shapes(spec)) == list(LAYER_LINEARS)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        r".*\.(q|k|v|o|gate|up|down)_proj",
        [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")],
        ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"],
        None,
    ],
    ids=["all-linear", "pattern", "suffixes", "paths", "none"],
)
def test_every_way_to_name_targets(targets: Any, folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, target_modules=targets)
    assert len(read_adapter(folder, spec).ranks) == 7


def test_a_pattern_through_peft_itself(toy_model: Path, spec: ModelSpec, tmp_path: Path) -> None:
    targets: Any = r".*self_attn\.[qk]_proj"
    folder = save_adapter(tmp_path / "adapter", toy_model, seed=1, targets=targets)
    assert list(read_adapter(folder, spec).ranks) == ["self_attn.q_proj", "self_attn.k_proj"]
    equals_peft(folder, toy_model, spec)


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


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS, task_type="CAUSAL_LM", **fields)


def write_config(config: PeftConfig, folder: Path) -> None:
    """As PEFT writes it, beside the adapter's weights."""
    config.save_pretrained(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"exclude_modules": ["lm_head"]},
        {"inference_mode": True, "revision": "main", "base_model_name_or_path": "somewhere"},
    ],
    ids=str,
)
def test_fields_that_change_nothing(fields: dict[str, Any], folder: Path, spec: ModelSpec) -> None:
    write_config(lora(**fields), folder)
    assert len(read_adapter(folder, spec).ranks) == 7


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, r"use_dora = true \(DoRA\)"),
        ({"use_rslora": True}, r"use_rslora = true .*rsLoRA"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\]'),
        ({"rank_pattern": {"q_proj": 8}}, r'rank_pattern = {"q_proj": 8}'),
        ({"alpha_pattern": {"q_proj": 32}}, r'alpha_pattern = {"q_proj": 32}'),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform = \[0, 2\]"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "layers_pattern|layers_to_transform"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias = true"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\]"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora = true"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "corda"),
        ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, "loftq"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_peft_can_do_and_bedplate_cannot_is_refused_by_its_name(
    fields: dict[str, Any], says: str, folder: Path, spec: ModelSpec
) -> None:
    write_config(lora(**fields), folder)
    refused(folder, spec, UnsupportedError, says, file=CONFIG)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights = 'lora_ga'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights = 'OLoRA'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "next_years"}, "init_lora_weights = 'next_years'"),
        ({"use_next_years_lora": True}, "use_next_years_lora = true"),
        ({"next_years_scale": 0}, "next_years_scale = 0"),
        ({"next_years_scale": 0.5}, "next_years_scale = 0.5"),
        ({"next_years_config": {"a": list(range(100))}}, "next_years_config = .*…"),
        ({"velora_config": {"rank": 1}}, "velora_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ],
    ids=str,
)
def test_an_unknown_field_with_a_value_is_refused(
    fields: dict[str, Any], says: str, folder: Path, spec: ModelSpec
) -> None:
    edit_config(folder, **fields)
    refused(folder, spec, UnsupportedError, says, file=CONFIG)


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
    write_config(config, folder)
    refused(folder, spec, UnsupportedError, f"PEFT type '{config.peft_type.value}'", file=CONFIG)


def test_a_config_without_a_type(folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, peft_type=None)
    refused(folder, spec, UnsupportedError, "PEFT type None", file=CONFIG)


@pytest.mark.parametrize("rank", [0, -1, "4", 4.0, True, None], ids=repr)
def test_a_rank_that_is_none(rank: Any, folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, r=rank)
    refused(folder, spec, AdapterError, "r must be a positive integer", file=CONFIG)


@pytest.mark.parametrize("alpha", ["8", None, True, float("nan"), float("inf")], ids=repr)
def test_an_alpha_that_is_none(alpha: Any, folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, lora_alpha=alpha)
    refused(folder, spec, AdapterError, "lora_alpha must be a number", file=CONFIG)


@pytest.mark.parametrize("alpha", [1e38, 1e300])
def test_an_alpha_beyond_float32(alpha: float, folder: Path, spec: ModelSpec) -> None:
    edit_weights(folder, lambda tensors: [value.fill_(1e3) for value in tensors.values()])
    edit_config(folder, lora_alpha=alpha)
    refused(folder, spec, AdapterError, "beyond float32", file=WEIGHTS)


def test_an_adapter_of_a_wider_model(folder: Path, spec: ModelSpec) -> None:
    wider = {FIRST: torch.zeros(4, 128)}
    edit_weights(folder, lambda tensors: tensors.update(wider))
    says = r"lora_A of layers\.0\.self_attn\.q_proj has shape \(4, 128\), .* want \(4, 64\)"
    refused(folder, spec, AdapterError, says, file=WEIGHTS)


def test_weights_of_another_rank_than_the_config(folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, r=8)
    refused(folder, spec, AdapterError, r"has shape \(.*4.*r = 8", file=WEIGHTS)


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


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        "base_model.model.lm_head.weight",
    ],
)
def test_a_key_that_matches_nothing_is_named(name: str, folder: Path, spec: ModelSpec) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(4, 64)}))
    refused(folder, spec, AdapterError, f"1 of 43 tensors match nothing .* {name}", file=WEIGHTS)


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


def test_a_tensor_under_two_names_is_no_silent_choice(folder: Path, spec: ModelSpec) -> None:
    short = FIRST.removeprefix("base_model.model.")
    edit_weights(folder, lambda tensors: tensors.update({short: tensors[FIRST] + 1}))
    refused(folder, spec, AdapterError, "is there twice", file=WEIGHTS)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "qkv_proj", "model.layers.0.mlp.fc1", "proj"])
def test_a_target_without_weights_is_named(target: str, folder: Path, spec: ModelSpec) -> None:
    edit_config(folder, target_modules=[*ALL_LINEARS, target])
    says = f"target_modules names {target.removeprefix('model.')}, but the weights hold nothing"
    refused(folder, spec, AdapterError, says, file=CONFIG)


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


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[]", b"null"], ids=repr)
def test_a_config_that_is_none(content: bytes, folder: Path, spec: ModelSpec) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder, spec, AdapterError, "is no JSON|is not a JSON object", file=CONFIG)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(file: str, folder: Path, spec: ModelSpec) -> None:
    (folder / file).unlink()
    refused(folder, spec, AdapterError, f"there is no {file}")


def test_weights_in_a_bin_file_only(folder: Path, spec: ModelSpec) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "save_pretrained" in str(refused(folder, spec, AdapterError, f"there is no {WEIGHTS}").hint)


def test_no_such_adapter(spec: ModelSpec, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", spec, NotFoundError, "no such folder")
