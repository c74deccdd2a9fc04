"""Names of tensors in PEFT files: the forms that programs write, and what bedplate does not take."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from peft_oracle import Oracle
from safetensors.torch import load_file, save_file
from toy import ALL_LINEARS

from bedplate.errors import AdapterError, UnsupportedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture
def folder(toy_adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_adapters["all"], tmp_path / "adapter"))


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new_name(name): value for name, value in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "new_name",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.removeprefix(PREFIX + "model."),
        lambda name: name.removeprefix("base_model."),
        lambda name: name.replace("_A.", "_A.default.").replace("_B.", "_B.default."),
        lambda name: name.replace("_A.", "_A.my adapter.").replace("_B.", "_B.my adapter."),
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda name: name.replace(".layers.", ".layers._orig_mod."),
        lambda name: "_fsdp_wrapped_module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace("model.layers", "language_model.model.layers"),
        lambda name: name.replace("model.layers", "language_model.layers"),
    ],
)
def test_a_form_of_the_names(new_name: Callable[[str], str], folder: Path, oracle: Oracle) -> None:
    expected = {path: (a, b) for path, a, b in oracle.read(folder).matrices()}
    rename(folder, new_name)
    for path, a, b in oracle.read(folder).matrices():
        assert (a == expected[path][0]).all() and (b == expected[path][1]).all() and a.any() and b.any()


@pytest.mark.parametrize(
    "other",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: "module." + name,
        lambda name: name.replace("lora_A.", "lora_A.default."),
        lambda name: name.replace("lora_A.", "lora_A.other."),
    ],
)
def test_a_tensor_under_two_names_is_no_silent_choice(
    other: Callable[[str], str], folder: Path, oracle: Oracle
) -> None:
    tensors = load_file(folder / WEIGHTS)
    first = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, other(first): tensors[first] + 1}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="is there twice, under two names"):
        oracle.read(folder)


def made_by_peft(oracle: Oracle, folder: Path, *, new_tokens: int = 0, **fields: Any) -> Path:
    """An adapter with more in it than a plain one, under the config of a plain one, which hides that."""
    base = copy.deepcopy(oracle.model)
    if new_tokens:
        base.resize_token_embeddings(base.config.vocab_size + new_tokens)
    targets = fields.pop("target_modules", ALL_LINEARS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields))
        model.save_pretrained(folder, save_embedding_layers=True if new_tokens else "auto")
    LoraConfig(r=4, lora_alpha=8, target_modules=ALL_LINEARS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "hold a magnitude of layers.*, but use_dora is false: PEFT would drop it"),
        ({"lora_bias": True}, "hold a bias of layers.*, but lora_bias is false: PEFT would drop it"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lora_B of lm_head, which the config does not adapt"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_B of embed_tokens, which the config does not"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices does not name its tokens: PEFT would"),
    ],
    ids=str,
)
def test_what_a_config_hides_and_peft_would_drop(
    fields: dict[str, Any], says: str, oracle: Oracle, tmp_path: Path
) -> None:
    folder = made_by_peft(oracle, tmp_path / "adapter", **fields)
    with pytest.raises(AdapterError, match=says) as caught:
        oracle.read(folder)
    assert caught.value.where == str(folder / CONFIG) and caught.value.hint


def test_what_a_config_hides_and_is_not_taken(oracle: Oracle, tmp_path: Path) -> None:
    folder = made_by_peft(oracle, tmp_path / "adapter", kasa_config=KasaConfig())
    with pytest.raises(UnsupportedError, match="lora_diag is KaSA") as caught:
        oracle.read(folder)
    assert caught.value.where == str(folder / WEIGHTS) and "merge" in str(caught.value.hint)


@pytest.mark.parametrize(
    "names", [["lm_head"], ["embed_tokens"], ["norm"], ["lm_head", "embed_tokens"]], ids=str
)
def test_parameters_that_a_config_hides_count_as_in_peft(
    names: list[str], oracle: Oracle, tmp_path: Path
) -> None:
    """PEFT copies them into the base, where a head that shares its weight with the embedding changes with it."""
    folder = made_by_peft(oracle, tmp_path / "adapter", modules_to_save=names)
    tensors = load_file(folder / WEIGHTS)
    changed = {name: value + 0.1 for name, value in tensors.items() if "lora" not in name}
    assert changed
    save_file(tensors | changed, folder / WEIGHTS)
    oracle.assert_equal(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.q_proj.base_layer.bias", "trained biases"),
        ("model.layers.0.mlp.down_proj.bias", "trained biases"),
        (
            "model.layers.0.self_attn.q_proj.base_layer.weight",
            "weights of the base model, trained in full (modules_to_save)",
        ),
        ("model.layers.0.mlp.up_proj.weight", "weights of the base model, trained in full (modules_to_save)"),
        ("model.layers.0.mlp.experts.base_layer.lora_A.weight", "several adapted parameters in one module"),
        ("model.layers.0.self_attn.q_proj.lora_E", "AdaLoRA"),
        ("score.weight", "a head of another task"),
        ("v_head.summary.weight", "a head of another task"),
        ("transformer.h.0.attn.c_attn.lora_A.weight", "a LoRA on a module that bedplate does not know"),
        ("model.layers.0.self_attn.q_proj.hada_w1_a", "something that bedplate does not know"),
        ("prompt_embeddings", "something that bedplate does not know"),
        ("", "something that bedplate does not know"),
    ],
)
def test_other_tensors_are_named(name: str, says: str, folder: Path, oracle: Oracle) -> None:
    save_file({**load_file(folder / WEIGHTS), PREFIX + name: torch.ones(64)}, folder / WEIGHTS)
    with pytest.raises(
        UnsupportedError, match=re.escape(f"tensor {PREFIX}{name} is {says}, which is not supported")
    ):
        oracle.read(folder)


@pytest.mark.parametrize(
    "fields",
    [{"monteclora_config": MontecloraConfig()}, {"velora_config": VeloraConfig(num_groups=8)}],
    ids=str,
)
def test_tensors_that_only_training_needs(fields: dict[str, Any], oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **fields)
    folder = oracle.save(tmp_path / "adapter", config)
    assert any("monteclora" in name or "velora" in name for name in load_file(folder / WEIGHTS))
    oracle.assert_equal(folder)
