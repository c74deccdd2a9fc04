"""What PEFT computes with an adapter, folded into A and B: exact, without another program."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from peft_oracle import TOLERANCE, Oracle
from safetensors.torch import load_file, save_file
from toy import ALL_LINEARS

from bedplate.errors import AdapterError, UnsupportedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, keep: Callable[[str], bool]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if keep(name)}, folder / WEIGHTS)


patterns = st.sampled_from(
    [
        "q_proj",
        "v_proj",
        r"layers\.1\..*",
        "model.layers.0.self_attn.q_proj",
        "mlp.up_proj",
        r".*_proj",
        "other",
    ]
)
targets = st.one_of(
    st.lists(st.sampled_from([*ALL_LINEARS, "Wqkv"]), min_size=1, unique=True),
    st.sampled_from(["all-linear", r".*layers\.[12]\..*(q|up)_proj"]),
)


@st.composite
def lora_configs(draw: st.DrawFn) -> LoraConfig:
    named = draw(targets)
    some_layers = draw(st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=1)))
    blocks = BdLoraConfig(
        ["q_proj", "up_proj"], ["v_proj", "layers.2.mlp.gate"], nblocks=2, match_strict=False
    )
    even = st.integers(1, 4).map(lambda half: 2 * half)
    return LoraConfig(
        r=draw(even),
        lora_alpha=draw(st.sampled_from([0, 1, 3.5, 8, 64])),
        target_modules=named,
        use_rslora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(patterns, even, max_size=3)),
        alpha_pattern=draw(st.dictionaries(patterns, st.sampled_from([0, 2, 9.5]), max_size=3)),
        exclude_modules=draw(st.sampled_from([None, ["k_proj"], r".*\.0\..*"])),
        layers_to_transform=some_layers if isinstance(named, list) else None,
        use_bdlora=draw(st.sampled_from([None, None, blocks])),
    )


@settings(max_examples=40, deadline=None)
@given(config=lora_configs())
def test_any_mixture_equals_peft(config: LoraConfig, oracle: Oracle, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("any") / "adapter"
    try:
        oracle.save(folder, config)
        expected = oracle.peft(folder)
    except (ValueError, RuntimeError):  # nothing is adapted; or rank_pattern, which PEFT sorts on saving
        assume(False)
    torch.testing.assert_close(oracle.applied(oracle.read(folder)), expected, rtol=0, atol=TOLERANCE)


def test_ranks_are_the_largest_of_the_layers(oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 7, "v_proj": 1},
    )
    adapter = oracle.assert_equal(oracle.save(tmp_path / "adapter", config))
    assert adapter.ranks == {"self_attn.q_proj": 7, "self_attn.v_proj": 1, "mlp.up_proj": 2}
    assert adapter.rank == 7
    a = {path: a for path, a, _ in adapter.matrices()}
    assert [len(a[f"layers.{layer}.self_attn.q_proj"]) for layer in range(3)] == [7, 7, 7]
    assert not a["layers.0.self_attn.q_proj"][2:].any()


def test_one_linear_of_one_layer(oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["model.layers.2.mlp.down_proj"])
    adapter = oracle.assert_equal(oracle.save(tmp_path / "adapter", config))
    assert adapter.ranks == {"mlp.down_proj": 4} and not adapter.warnings


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"down_proj.weight": 2}, "alpha_pattern": {r".*\.weight": 3}},
        {"rank_pattern": {"down_proj": 2}},  # patterns see the parameter's name, and this one does not match
        {"target_modules": ["q_proj"], "exclude_modules": ["down_proj"]},
    ],
    ids=str,
)
def test_target_parameters(fields: dict[str, Any], oracle: Oracle, tmp_path: Path) -> None:
    parameters = ["down_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    config = LoraConfig(**{"r": 4, "target_modules": [], "target_parameters": parameters, **fields})
    oracle.assert_equal(oracle.save(tmp_path / "adapter", config))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True}], ids=str)
def test_a_start_that_changes_the_base_converted_on_saving(
    start: Any, fields: dict[str, Any], oracle: Oracle, tmp_path: Path
) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start, **fields)
        model = get_peft_model(copy.deepcopy(oracle.model), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-0.5)
        model.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    adapter = oracle.assert_equal(tmp_path / "adapter")
    assert adapter.ranks["self_attn.v_proj"] == 8


@pytest.mark.parametrize("start", [True, "gaussian", "mica", "eva", "orthogonal"])
def test_tensors_that_are_missing_change_nothing_as_in_peft(
    start: Any, oracle: Oracle, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    folder = oracle.save(tmp_path / "adapter", config)
    edit_weights(folder, lambda name: "layers.1." not in name)
    (warning,) = oracle.assert_equal(folder).warnings
    assert "the config adapts model.layers.1.self_attn.q_proj, but the weights hold nothing" in warning
    assert "(nor for 1 more)" in warning


def test_tensors_that_are_missing_where_peft_takes_random_ones(oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = oracle.save(tmp_path / "adapter", config)
    edit_weights(folder, lambda name: "layers.1." not in name)
    with pytest.raises(AdapterError, match=r"hold nothing for it.* PEFT would take random numbers"):
        oracle.read(folder)


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half(half: str, oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.save(tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    edit_weights(folder, lambda name: f"layers.1.self_attn.q_proj.lora_{half}" not in name)
    with pytest.raises(AdapterError, match=rf"lora_{half} of layers\.1\.self_attn\.q_proj is missing"):
        oracle.read(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": None},
        {"target_modules": []},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "blocks"},
    ],
    ids=str,
)
def test_tensors_that_peft_would_drop_are_refused(
    changes: dict[str, Any], oracle: Oracle, tmp_path: Path
) -> None:
    folder = oracle.save(tmp_path / "adapter", LoraConfig(r=4, target_modules=["v_proj", "up_proj"]))
    edit_config(folder, **changes)
    with pytest.raises(
        AdapterError, match=r"layers\.\d\.\S+, which the config does not adapt: PEFT would drop"
    ):
        oracle.read(folder)


@pytest.mark.parametrize("name", ["pissa_backup", "pissa_init"])
def test_pissa_that_looks_like_a_plain_adapter_is_pointed_out(
    name: str, oracle: Oracle, tmp_path: Path
) -> None:
    folder = oracle.save(tmp_path / name, LoraConfig(r=4, target_modules=["q_proj"]))
    (warning,) = oracle.read(folder).warnings
    assert "training began with PiSSA" in warning and "pissa_converted" in warning


def test_block_diagonal_halves_of_the_wrong_shape(oracle: Oracle, tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    folder = oracle.save(tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], use_bdlora=blocks))
    oracle.assert_equal(folder)
    for nblocks, says in [(4, "has shape"), (3, "3 blocks"), (2**30, "blocks")]:
        edit_config(folder, use_bdlora={**dataclasses.asdict(blocks), "nblocks": nblocks})
        with pytest.raises(AdapterError, match=says):
            oracle.read(folder)


def test_whole_paths_are_adapted_beside_layers_to_transform(oracle: Oracle, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        target_modules=["model.layers.2.self_attn.q_proj", "v_proj", "lm_head"],
        layers_to_transform=[0],
    )
    adapter = oracle.assert_equal(oracle.save(tmp_path / "adapter", config))
    assert {(2, "self_attn.q_proj"), (0, "self_attn.v_proj"), (None, "lm_head")} == set(adapter.pairs)
    assert not adapter.warnings
    config = LoraConfig(
        r=4, target_modules=["v_proj", "lm_head"], layers_to_transform=[0], ensure_weight_tying=True
    )
    adapter = oracle.assert_equal(oracle.save(tmp_path / "tied", config))  # PEFT adds the embedding's path
    assert {(0, "self_attn.v_proj"), (None, "lm_head"), (None, "embed_tokens")} == set(adapter.pairs)


def test_many_whole_paths_beside_layers_to_transform(oracle: Oracle, tmp_path: Path) -> None:
    """From 20 on, PEFT shortens them, and then they count in some layers only."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in names]
    paths += [
        f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ALL_LINEARS if name not in names
    ]
    folder = oracle.save(tmp_path / "adapter", LoraConfig(r=4, target_modules=ALL_LINEARS))
    edit_config(folder, target_modules=paths, layers_to_transform=[0, 1, 2])
    oracle.assert_equal(folder)
    edit_config(folder, layers_to_transform=[0])
    with pytest.raises(
        UnsupportedError, match=r"target_modules holds 21 names, .* and layers_to_transform is set"
    ):
        oracle.read(folder)


def test_what_is_trained_in_full_is_no_target(oracle: Oracle, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    folder = oracle.save(tmp_path / "head", LoraConfig(**fields, modules_to_save=["lm_head"]))
    assert not oracle.assert_equal(folder).warnings
    folder = oracle.save(tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name in ("q_pro.", ".*q_proj$"):  # to PEFT a pattern here, and no module's name elsewhere
        edit_config(folder, modules_to_save=[name])
        with pytest.raises(
            AdapterError, match=r"lora_B of layers\.0\.self_attn\.q_proj, which the config does not"
        ):
            oracle.read(folder)
    edit_config(folder, modules_to_save=["q_proj("])
    with pytest.raises(AdapterError, match=r"modules_to_save holds .* which is not a regular expression"):
        oracle.read(folder)
