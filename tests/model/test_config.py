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
from transformers.activations import ACT2FN

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.config import read_config, spec_from_config
from bedplate.model.parts import activation
from bedplate.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
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
    assert spec.ropes[0].frequencies[4] == pytest.approx(10000.0**-0.5)
    assert (spec.tied_head, spec.qkv_bias, spec.output_bias, spec.mlp_bias) == (False, False, False, False)


def test_what_an_older_config_leaves_out() -> None:
    left_out = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    config = {name: value for name, value in CONFIG.items() if name not in left_out}
    spec = spec_from_config({**config, "head_dim": None}, where="x")
    assert spec.n_kv_heads == spec.n_heads
    assert (spec.head_dim, spec.max_positions, spec.norm_eps) == (16, 2048, 1e-6)


@pytest.mark.parametrize("architectures", [None, []])
def test_without_architectures_it_is_the_causal_model_of_its_type(architectures: Any) -> None:
    """As transformers' AutoModelForCausalLM has it."""
    assert spec_from_config({**CONFIG, "architectures": architectures}, where="x") == spec_from_config(
        CONFIG, where="x"
    )


def test_every_name_of_an_activation_is_taken_and_no_other() -> None:
    x = torch.linspace(-4, 4, 64)
    named = {
        name: kind
        for kind in ("silu", "gelu_tanh", "relu2")
        for name in ACT2FN
        if torch.allclose(ACT2FN[name](x), activation(kind)(x), atol=1e-5)
    }
    assert {"silu", "swish", "gelu_pytorch_tanh", "relu2"} <= named.keys()
    for name in ACT2FN:
        config = {**CONFIG, "hidden_act": name}
        if name in named:
            assert spec_from_config(config, where="x").activation == named[name]
        else:
            refused(config, UnsupportedError, f"hidden_act = '{name}'")


def test_the_installed_transformers_config_is_read() -> None:
    config = toy_config(attention_bias=True, mlp_bias=True)
    written = json.loads(config.to_json_string())
    spec = spec_from_config(written, where="x")
    assert (spec.head_dim, spec.tied_head, spec.qkv_bias, spec.mlp_bias) == (32, True, True, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            "MistralForCausalLM.* 'llama', which means LlamaForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "Other"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'"),
        ({"architectures": {}}, "architectures {}"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' \(architectures \['LlamaForCausalLM'\]\)"),
        ({"model_type": "granite"}, "LlamaForCausalLM.* 'granite', which means GraniteForCausalLM"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"is_causal": False}, "is_causal = False"),
        ({"is_causal": 1}, "is_causal = 1"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safetensors'"),
        ({"configuration_files": ["config.4.json"]}, "configuration_files"),
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    refused({**CONFIG, **changes}, UnsupportedError, says)


@pytest.mark.parametrize(
    "field", [name for name in CONFIG if name not in ("model_type", "architectures", "rms_norm_eps")]
)
@pytest.mark.parametrize(
    "value", [0, -1, "64", True, 1.5, [4], {}, float("nan"), 10**12, 10**400, "9" * 999], ids=str
)
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
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps must be below 1"),
        ({"head_dim": 2**13}, "head_dim"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, Any], says: str) -> None:
    refused({**CONFIG, **changes}, CheckpointError, says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "is nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
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


def test_a_folder_in_place_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.hint


def test_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json") as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.where == str(tmp_path)
    assert "Hugging Face" in str(caught.value.hint)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -1, 2**31, 2**63, 64, 4])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [*toy_config().to_dict(), "rope_scaling", "rope_theta", "original_max_position_embeddings"]
)


@settings(max_examples=300)
@given(changes=st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
def test_any_config_gives_a_spec_or_an_error_of_ours(changes: dict[str, Any]) -> None:
    try:
        spec = spec_from_config({**CONFIG, **changes}, where="here/config.json")
    except BedplateError as error:
        assert error.where == "here/config.json" and error.hint
        assert len(str(error)) < 500
    else:
        assert isinstance(spec, ModelSpec)


def test_a_folder_of_the_hubs_cache_names_the_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"there is no config\.json") as caught:
        read_config(tmp_path / "models--x--y" / "config.json")
    assert str(snapshot) in str(caught.value.hint)
