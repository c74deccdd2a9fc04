"""A config.json → dimensions: read in every spelling, and what is not computed is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.decoder import rope_table
from bedplate.model.spec import Llama3Scaling, RopeSpec, read_config, spec_from_config, spec_from_dict

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def refused(config: dict[str, Any], kind: type[BedplateError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        spec_from_config(config, where="here/config.json")
    assert caught.value.where == "here/config.json"
    assert caught.value.hint


def test_dimensions_and_defaults() -> None:
    spec = spec_from_config(CONFIG, where="x")
    assert (spec.dim, spec.n_layers, spec.n_heads, spec.n_kv_heads) == (64, 2, 4, 2)
    assert (spec.hidden_dim, spec.vocab_size, spec.max_positions, spec.norm_eps) == (96, 320, 256, 1e-5)
    assert spec.head_dim == 64 // 4
    assert spec.rope == RopeSpec(theta=10000.0, scaling=None)
    assert (spec.tied_head, spec.attention_bias, spec.mlp_bias) == (False, False, False)


def test_what_an_older_config_leaves_out() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "num_key_value_heads"}
    spec = spec_from_config({**config, "head_dim": None, "rope_theta": None, "rms_norm_eps": None}, where="x")
    assert spec.n_kv_heads == spec.n_heads
    assert (spec.head_dim, spec.rope.theta, spec.norm_eps) == (16, 10000.0, 1e-6)


def test_the_installed_transformers_config_is_read() -> None:
    config = toy_config(rope_parameters={"rope_theta": 5e5, **LLAMA3}, attention_bias=True, mlp_bias=True)
    written = {**json.loads(config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    spec = spec_from_config(written, where="x")
    assert (spec.head_dim, spec.tied_head, spec.attention_bias, spec.mlp_bias) == (32, True, True, True)
    assert spec.rope.theta == 5e5 and spec.rope.scaling is not None


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 500000, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 8}},
    ],
    ids=["transformers 4", "older type", "transformers 5", "whole rotation", "integers"],
)
def test_every_spelling_of_llama3_rope_is_the_same(spelling: dict[str, Any]) -> None:
    spec = spec_from_config({**CONFIG, **spelling}, where="x")
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert spec.rope == RopeSpec(theta=5e5, scaling=scaling)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "type": "default"}},
    ],
)
def test_every_spelling_of_default_rope_is_the_same(spelling: dict[str, Any]) -> None:
    assert spec_from_config({**CONFIG, **spelling}, where="x").rope == RopeSpec(theta=1e6, scaling=None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "Other"),
        ({"architectures": None}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 1.2}}, "attention_factor = 1.2"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    refused({**CONFIG, **changes}, UnsupportedError, says)


@pytest.mark.parametrize("field", [name for name in CONFIG if name not in ("architectures", "rms_norm_eps")])
@pytest.mark.parametrize("value", [0, -1, "64", True, 1.5, [4]], ids=repr)
def test_a_size_that_is_none_is_named(field: str, value: Any) -> None:
    refused({**CONFIG, field: value}, CheckpointError, field)


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_size_that_is_missing_is_named(field: str) -> None:
    refused({name: value for name, value in CONFIG.items() if name != field}, CheckpointError, field)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor 1.0 is not below"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "original_max_position"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, Any], says: str) -> None:
    refused({**CONFIG, **changes}, CheckpointError, says)


def test_a_dict_of_the_spec_gives_it_back() -> None:
    for rope in ({}, {"rope_scaling": LLAMA3}):
        spec = spec_from_config({**CONFIG, **rope}, where="x")
        stored = json.loads(json.dumps(spec.to_dict()))
        assert spec_from_dict({**stored, "max_context": 2048}) == spec


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "not a JSON object"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_a_config_file_that_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_config(path)
    assert caught.value.where == str(path) and caught.value.hint


def test_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json") as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.where == str(tmp_path)
    assert "Hugging Face" in str(caught.value.hint)


ROPES = st.fixed_dictionaries(
    {
        "rope_theta": st.floats(100.0, 1e7),
        "factor": st.floats(1.0, 64.0),
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(3.0, 8.0),
        "original_max_position_embeddings": st.integers(16, 16384),
    }
)


@settings(max_examples=50, deadline=None)
@given(
    parameters=ROPES, head_dim=st.sampled_from([2, 8, 64, 128]), kind=st.sampled_from(["default", "llama3"])
)
def test_the_rope_table_is_that_of_transformers(parameters: dict[str, Any], head_dim: int, kind: str) -> None:
    if kind == "default":
        parameters = {"rope_theta": parameters["rope_theta"]}
    config = toy_config(head_dim=head_dim, rope_parameters={"rope_type": kind, **parameters})
    spec = spec_from_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, where="x")
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(config.to_dict()))
    positions = torch.arange(64)[None]
    ours = rope_table(spec.rope, head_dim, 64)
    for table, expected in zip(ours, theirs(torch.zeros(1), positions), strict=True):
        # The same float32 operations; where a frequency's last bit differs (the order of two divisions), an angle
        # of up to 64 radians differs by 64 · 2⁻²³.
        torch.testing.assert_close(table[:, :, 0], expected, rtol=0, atol=64 * 2.0**-22)
