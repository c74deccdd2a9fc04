"""What of a PEFT adapter is refused: by its name, before anything is computed, because PEFT refuses it or drops it, or
because bedplate does not compute it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_toy, save_toy, save_trained
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from bedplate.errors import AdapterError, BedplateError, UnsupportedError
from bedplate.model.adapter import read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.spec import ModelSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Edit = Callable[[dict[str, Any], dict[str, Tensor]], Any]


class Toy:
    def __init__(self, folder: Path, family: str, variant: str) -> None:
        self.model = folder
        save_toy(folder, make_toy(family, variant))
        self.spec: ModelSpec = open_checkpoint(folder).spec


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Toy]:
    folder = tmp_path_factory.mktemp("toys")
    kinds = {"tied": ("llama", "first"), "untied": ("qwen3", "first"), "biased": ("llama", "biases, untied")}
    return {name: Toy(folder / name, *kind) for name, kind in kinds.items()}


def save(toy: Toy, folder: Path, fields: dict[str, Any], edit: Edit = lambda config, tensors: None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_trained(folder, toy.model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    edit(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def without(end: str) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(end)]:
            del tensors[name]

    return edit


def with_config(**fields: Any) -> Edit:
    return lambda config, tensors: config.update(fields)


def with_tensor(name: str, *shape: int) -> Edit:
    return lambda config, tensors: tensors.update({PREFIX + name: torch.ones(shape)})


def cut(end: str, rows: int) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(end)]:
            tensors[name] = tensors[name][:rows]

    return edit


HEAD = {"modules_to_save": ["lm_head"]}
TOKENS = {"trainable_token_indices": [5, 3]}
ALORA: dict[str, Any] = {"alora_invocation_tokens": [5, 3], "task_type": "CAUSAL_LM"}
Q = "model.layers.0.self_attn.q_proj"
CASES: list[tuple[str, dict[str, Any], Edit, type[BedplateError], str]] = [
    # What bedplate does not compute.
    (
        "tied",
        {"target_modules": ["embed_tokens"], "use_dora": True},
        with_config(),
        UnsupportedError,
        r"use_dora = true on the embedding \(DoRA\) is not supported",
    ),
    (
        "untied",
        {"layer_replication": [(0, 2), (1, 3)]},
        with_config(),
        UnsupportedError,
        "layer_replication of a model whose layers differ",
    ),
    (
        "tied",
        TOKENS,
        with_config(trainable_token_indices={"q_proj": [1]}),
        UnsupportedError,
        "trainable_token_indices names 'q_proj': only the embedding and the head",
    ),
    (
        "tied",
        HEAD,
        with_config(trainable_token_indices={"lm_head": [1]}),
        UnsupportedError,
        "of lm_head, which is adapted or trained in full too",
    ),
    (
        "untied",
        {"target_modules": ["lm_head"]},
        with_config(modules_to_save=["m_head"]),  # PEFT takes the ends of names, and here no whole name
        UnsupportedError,
        "modules_to_save names lm_head, which is adapted too",
    ),
    ("tied", {}, with_tensor(f"{Q}.base_layer.bias", 64), UnsupportedError, "trained biases"),
    # What PEFT has on everywhere, though the adapter is on only from its invocation.
    *(
        (
            toy,
            {**ALORA, **fields},
            with_config(),
            UnsupportedError,
            rf"\(aLoRA\) with {what} is not supported",
        )
        for toy, fields, what in (
            ("tied", {"modules_to_save": ["norm"]}, r"layers\.0\.input_layernorm\.weight of its own"),
            ("tied", TOKENS, "trained tokens"),
            ("tied", {"layer_replication": [(0, 2), (1, 3)]}, "replicated layers"),
            ("biased", {"bias": "all"}, r"layers\.0\.\S+_proj\.bias of its own"),
        )
    ),
    *(
        (
            "tied",
            fields,
            with_config(**ALORA),
            AdapterError,
            f"alora_invocation_tokens and {what} cannot stand together",
        )
        for fields, what in (
            ({"use_dora": True}, "use_dora"),
            ({"use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)}, "use_bdlora"),
            ({"init_lora_weights": "mica"}, 'init_lora_weights = "mica"'),
            ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
        )
    ),
    (
        "tied",
        {"target_modules": ["embed_tokens"]},
        with_config(**ALORA),
        AdapterError,
        "alora_invocation_tokens is set and the embedding is adapted, which PEFT refuses",
    ),
    (
        "tied",
        {},
        with_config(alora_invocation_tokens=[5]),
        UnsupportedError,
        "task_type = null: PEFT never turns such an adapter on",
    ),
    (
        "tied",
        {},
        with_config(**{**ALORA, "task_type": "SEQ_CLS"}),
        UnsupportedError,
        'task_type = "SEQ_CLS": PEFT',
    ),
    (
        "tied",
        {},
        with_config(**{**ALORA, "alora_invocation_tokens": [5, 96]}),
        AdapterError,
        r"its invocation \(alora_invocation_tokens\) has the token 96, but the model has 96 tokens",
    ),
    *(
        (
            "tied",
            {},
            with_config(**{**ALORA, "alora_invocation_tokens": value}),
            AdapterError,
            "alora_invocation_tokens must be a list of token ids, got ",
        )
        for value in (5, [5, True], [5, -1], ["5"], [[5]], [5.0], {"a": 5}, "5", True)
    ),
    # What PEFT would drop, or does not find.
    (
        "untied",
        {"target_modules": ["lm_head"]},
        with_config(modules_to_save=["lm_head"]),
        AdapterError,
        "lora_B of lm_head, which the config does not adapt",
    ),
    ("tied", HEAD, without("lm_head.weight"), AdapterError, r"trains lm_head in full \(modules_to_save\)"),
    (
        "tied",
        {"modules_to_save": ["norm"]},
        without("model.norm.weight"),
        AdapterError,
        "trains norm in full",
    ),
    (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        without("lm_head.weight"),
        AdapterError,
        "trains lm_head in full",
    ),
    ("tied", TOKENS, without("_delta"), AdapterError, "the trained tokens of embed_tokens are missing"),
    (
        "tied",
        {"use_dora": True},
        without("magnitude_vector"),
        AdapterError,
        "use_dora is true, but",
    ),
    (
        "tied",
        {"lora_bias": True},
        without("lora_B.bias"),
        AdapterError,
        "lora_bias is true, but",
    ),
    (
        "untied",
        {"target_modules": ["lm_head"]},
        lambda config, tensors: tensors.update(
            {f"{PREFIX}lm_head.weight": tensors.pop(f"{PREFIX}lm_head.base_layer.weight")}
        ),
        AdapterError,
        "lm_head.weight, for which PEFT finds no place",
    ),
    (
        "tied",
        HEAD,
        with_tensor("model.embed_tokens.base_layer.weight", 96, 64),
        AdapterError,
        "embed_tokens.base_layer.weight, for which PEFT finds no place",
    ),
    (
        "untied",
        HEAD,
        with_tensor("lm_head.modules_to_save.weight", 96, 64),
        AdapterError,
        "lm_head.modules_to_save.weight, which PEFT would drop",
    ),
    (
        "untied",
        HEAD,
        with_tensor("lm_head.original_module.weight", 95, 64),
        AdapterError,
        "lm_head.original_module.weight, which PEFT would drop or",
    ),
    (
        "untied",
        {},
        with_tensor("lm_head.original_module.weight", 96, 64),
        AdapterError,
        "lm_head.original_module.weight, which PEFT would drop",
    ),
    (
        "tied",
        TOKENS,
        with_tensor("lm_head.token_adapter.trainable_tokens_delta", 2, 64),
        AdapterError,
        "but the head goes with the embedding",
    ),
    # Numbers that do not fit.
    ("tied", TOKENS, cut("_delta", 1), AdapterError, r"have shape \(1, 64\), but .* names 2"),
    (
        "tied",
        TOKENS,
        with_config(trainable_token_indices=[5, 96]),
        AdapterError,
        "a row of token 96 in embed_tokens",
    ),
    ("tied", TOKENS, with_config(trainable_token_indices=[5, 5]), AdapterError, "names a token twice"),
    (
        "tied",
        TOKENS,
        with_config(trainable_token_indices=[5, -1]),
        AdapterError,
        "must be lists of token ids",
    ),
    (
        "tied",
        TOKENS,
        with_config(trainable_token_indices={"lm_head": 3}),
        AdapterError,
        "must be lists of token ids",
    ),
    ("tied", TOKENS, with_config(trainable_token_indices=7), AdapterError, "must be lists of token ids"),
    (
        "tied",
        {"use_dora": True},
        cut("magnitude_vector", 3),
        AdapterError,
        r"the magnitude of layers\.\d.* \(3,\)",
    ),
    ("tied", {"lora_bias": True}, cut("lora_B.bias", 3), AdapterError, r"the bias of layers\.\d.* \(3,\)"),
    (
        "tied",
        {"modules_to_save": ["norm"]},
        cut("model.norm.weight", 3),
        AdapterError,
        r"norm.weight has shape \(3,\)",
    ),
    (
        "untied",
        HEAD,
        cut("lm_head.weight", 90),
        UnsupportedError,
        "has 90 tokens, fewer than the 96 of the model",
    ),
    ("tied", {}, with_config(layer_replication=[[0, 5]]), AdapterError, "goes beyond the 4 layers"),
    ("tied", {}, with_config(layer_replication=[[2, 2]]), AdapterError, "must be a list of ranges of layers"),
    (
        "tied",
        {},
        with_config(layer_replication=[[-1, 2]]),
        AdapterError,
        "must be a list of ranges of layers",
    ),
    ("tied", {}, with_config(layer_replication=[[0, 4]] * 2000), AdapterError, "makes 8000 layers"),
    ("tied", {}, with_config(layer_replication="0-2"), AdapterError, "must be a list of ranges of layers"),
    ("tied", {}, with_config(modules_to_save=[""]), AdapterError, "modules_to_save holds an empty name"),
    ("tied", {}, with_config(modules_to_save=[3]), AdapterError, "modules_to_save must be a list of names"),
    # What PEFT refuses.
    (
        "tied",
        {"use_dora": True},
        with_config(lora_bias=True),
        AdapterError,
        "use_dora and lora_bias cannot",
    ),
    (
        "tied",
        {"use_dora": True},
        with_config(init_lora_weights="mica"),
        AdapterError,
        'use_dora and init_lora_weights = "mica" cannot stand together',
    ),
    (
        "tied",
        {"lora_bias": True},
        with_config(init_lora_weights="gaussian"),
        AdapterError,
        "lora_bias and init_lora_weights",
    ),
    (
        "tied",
        {"target_modules": ["embed_tokens"]},
        with_config(lora_bias=True),
        AdapterError,
        "lora_bias is (set and the embedding is adapted|true, but)",
    ),
    (
        "tied",
        {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}},
        with_config(ensure_weight_tying=True),
        AdapterError,
        "names other tokens of the head than of the embedding",
    ),
]


@pytest.mark.parametrize(("toy", "fields", "edit", "kind", "says"), CASES, ids=[case[4] for case in CASES])
def test_what_is_not_taken_is_named(
    toy: str,
    fields: dict[str, Any],
    edit: Edit,
    kind: type[BedplateError],
    says: str,
    toys: dict[str, Toy],
    tmp_path: Path,
) -> None:
    folder = save(toys[toy], tmp_path / "adapter", fields, edit)
    with pytest.raises(kind, match=says) as caught:
        read_adapter(folder, toys[toy].spec)
    assert caught.value.where is not None and caught.value.where.startswith(str(folder)) and caught.value.hint


def test_a_shared_weight_with_two_values(toys: dict[str, Toy], tmp_path: Path) -> None:
    def differ(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}lm_head.weight"] = torch.ones(96, 64)
        tensors[f"{PREFIX}model.embed_tokens.weight"] = torch.zeros(96, 64)

    folder = save(toys["tied"], tmp_path / "adapter", {}, differ)
    with pytest.raises(AdapterError, match="share one weight, but the file has different numbers"):
        read_adapter(folder, toys["tied"].spec)


@pytest.mark.parametrize("names", [["classifier", "score"], ["nothing"]], ids=str)
def test_modules_that_the_model_does_not_have(names: list[str], toys: dict[str, Toy], tmp_path: Path) -> None:
    """PEFT names them itself for some tasks, and finds none."""
    folder = save(toys["tied"], tmp_path / "adapter", {}, with_config(modules_to_save=names))
    assert read_adapter(folder, toys["tied"].spec).parameters == {}
