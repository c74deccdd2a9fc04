"""Each field of PEFT's LoraConfig: bedplate computes what PEFT does with it, or refuses it by its name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import EvaConfig, LoftQConfig, LoraConfig
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft_oracle import TOLERANCE, Oracle

from bedplate.errors import BedplateError
from bedplate.model.adapter.peft_fields import NO_EFFECT, REFUSED, USED

CONFIG = "adapter_config.json"
PATH = "model.layers.1.self_attn.q_proj"
# For each field of LoraConfig values other than its default; made through PEFT if it lets them be made.
CHANGES: dict[str, list[Any]] = {
    "task_type": ["CAUSAL_LM", "FEATURE_EXTRACTION", None],
    "peft_type": ["IA3", "LOHA", "ADALORA"],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}],
    "peft_version": ["0.99.0", "0.15.0"],
    "base_model_name_or_path": ["somewhere/else"],
    "revision": ["main"],
    "inference_mode": [True],
    "r": [1, 3, 32],
    "target_modules": [
        ["q_proj"],
        ["v_proj", "Wqkv", "query_key_value", "c_attn"],
        ["self_attn.k_proj", "down_proj"],
        [PATH],
        r".*\.mlp\.(up|down)_proj",
        r"model\.layers\.[02]\.self_attn\..*_proj",
        "all-linear",
        ["lm_head", "q_proj"],
        ["embed_tokens", "q_proj"],
        None,
    ],
    "exclude_modules": [["v_proj"], ["model.layers.0.self_attn.q_proj"], r".*layers\.1\..*", ["lm_head"]],
    "lora_alpha": [1, 7, 2.5, 0, -3],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"], ["norm"], ["embed_tokens"], ["mlp"]],
    "init_lora_weights": [
        False,
        "gaussian",
        "orthogonal",
        "eva",
        "mica",
        "pissa",
        "pissa_niter_4",
        "olora",
        "OLoRA",
        "corda",
        "loftq",
        "lora_ga",
        "next_years",
        3,
    ],
    "layers_to_transform": [1, [0, 2], []],
    "layers_pattern": ["layers", ["blocks", "layers"]],
    "rank_pattern": [
        {"q_proj": 2},
        {"layers.1.self_attn.v_proj": 9},
        {PATH: 1, "q_proj": 3},
        {"q_proj": 3, PATH: 1},
        {r"layers\.[01]\..*": 5, "v_proj": 6},
        {"_proj": 3},
        {r".*_proj": 3},
        {"nothing": 3},
    ],
    "alpha_pattern": [
        {"q_proj": 2},
        {PATH: 9, "q_proj": 31},
        {"q_proj": 31, PATH: 9},
        {r"v_.*": 0.5},
        {"v_proj": 0},
    ],
    "megatron_config": [{"hidden_size": 64}],
    "megatron_core": ["another.core"],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "loftq_config": [LoftQConfig()],
    "eva_config": [EvaConfig()],
    "corda_config": [CordaConfig()],
    "lora_ga_config": [LoraGAConfig()],
    "use_dora": [True],
    "velora_config": [VeloraConfig(num_groups=8)],
    "alora_invocation_tokens": [[42], [319, 318], [], [320]],
    "use_qalora": [True],
    "qalora_group_size": [32],
    "monteclora_config": [MontecloraConfig()],
    "layer_replication": [[(0, 2), (1, 3)]],
    "runtime_config": [LoraRuntimeConfig(ephemeral_gpu_offload=True)],
    "lora_bias": [True],
    "target_parameters": [
        ["mlp.up_proj.weight"],
        ["model.layers.1.mlp.down_proj.weight"],
        ["q_proj.weight"],
        ["norm.weight"],
    ],
    "use_bdlora": [
        BdLoraConfig(target_modules_bd_a=["v_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
        BdLoraConfig(target_modules_bd_b=["layers.1"], nblocks=4, match_strict=False),
        BdLoraConfig(target_modules_bd_a=["q_proj"]),
    ],
    "arrow_config": [ArrowConfig()],
    "kasa_config": [KasaConfig()],
    "ensure_weight_tying": [True],
}
# What a field cannot be set without.
BESIDE: dict[str, dict[str, Any]] = {
    "layers_pattern": {"layers_to_transform": [0, 2]},
    "alora_invocation_tokens": {"task_type": "CAUSAL_LM"},
}
# Values of fields that are taken, which are not: bedplate refuses them, or PEFT does.
NOT_EQUAL = [
    *(("peft_type", value) for value in CHANGES["peft_type"]),
    *(("init_lora_weights", value) for value in CHANGES["init_lora_weights"][5:]),
    ("modules_to_save", ["mlp"]),  # whole linears
    ("rank_pattern", {"q_proj": 3, PATH: 1}),  # PEFT sorts it on saving, and then refuses its own file
    ("target_parameters", ["q_proj.weight"]),  # target_modules names it too
    ("target_parameters", ["norm.weight"]),  # no matrix
    ("use_bdlora", CHANGES["use_bdlora"][2]),  # leaves out v_proj, and is strict
    ("alora_invocation_tokens", [320]),  # no token of the model
]


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture(scope="module")
def plain(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(tmp_path_factory.mktemp("plain") / "adapter", lora())


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields})


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}, default=dataclasses.asdict))
    return folder


def save(oracle: Oracle, plain: Path, folder: Path, field: str, value: Any) -> Path:
    """An adapter with the field set: as PEFT makes it or, where it cannot, written into a plain one's config."""
    beside = BESIDE.get(field, {})
    if field == "peft_type":  # PEFT sets it itself
        return edit(Path(shutil.copytree(plain, folder)), peft_type=value)
    try:
        return oracle.save(folder, lora(**beside, **{field: value}))
    except Exception:
        return edit(Path(shutil.copytree(plain, folder, dirs_exist_ok=True)), **beside, **{field: value})


def outcome(oracle: Oracle, folder: Path, field: str, value: Any) -> str:
    """`equal` or `refused`, or `no answer` where PEFT has none.

    Fails where PEFT computes something else, or the refusal does not say what it is about.
    """
    try:
        adapter = oracle.read(folder)
    except BedplateError as error:
        names = [field, *(value if isinstance(value, list) else [])]
        assert any(str(name) in str(error) for name in names), error
        assert error.hint and error.where and error.where.startswith(str(folder))
        return "refused"
    try:
        expected = oracle.peft(folder)
    except Exception:
        return "no answer"
    assert float((oracle.applied(adapter) - expected).abs().max()) < TOLERANCE
    return "equal"


def test_every_field_of_peft_has_a_decision() -> None:
    """A new field of a newer PEFT fails here: find out what it does at inference."""
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    assert fields - (USED | NO_EFFECT | REFUSED.keys()) == set()
    assert fields - CHANGES.keys() == set()
    assert not (USED & NO_EFFECT or USED & REFUSED.keys() or NO_EFFECT & REFUSED.keys())


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in CHANGES.items() for value in values], ids=str
)
def test_a_field_means_what_peft_makes_of_it(
    field: str, value: Any, oracle: Oracle, plain: Path, tmp_path: Path
) -> None:
    folder = save(oracle, plain, tmp_path / "adapter", field, value)
    result = outcome(oracle, folder, field, value)
    if field in REFUSED and value != []:
        assert result == "refused"
    elif (field, value) not in NOT_EQUAL:
        assert result == "equal"
