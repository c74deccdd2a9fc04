"""RoPE in a config.json: in every spelling the table of transformers, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_config
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.decoder import rope_table
from bedplate.model.fields import Fields
from bedplate.model.rope_config import rope_spec
from bedplate.spec import Llama3Scaling, RopeSpec

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default"}


def read(config: dict[str, Any]) -> RopeSpec:
    return rope_spec(Fields(config, "here/config.json"), max_positions=256)


def refused(config: dict[str, Any], kind: type[BedplateError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        read(config)
    assert caught.value.where == "here/config.json" and caught.value.hint


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
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    assert read(spelling) == RopeSpec(theta=5e5, scaling=scaling)


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
    assert read(spelling) == RopeSpec(theta=1e6, scaling=None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": LLAMA3}, LLAMA3),
        ({"rope_parameters": LLAMA3, "rope_scaling": DEFAULT}, DEFAULT),
        ({"rope_parameters": LLAMA3, "rope_scaling": {}}, LLAMA3),
        ({"rope_parameters": LLAMA3, "rope_scaling": None}, LLAMA3),
        (
            {
                "rope_parameters": {**DEFAULT, "rope_theta": 5e5},
                "rope_scaling": {**DEFAULT, "rope_theta": 7e5},
            },
            {**DEFAULT, "rope_theta": 7e5},
        ),
        # Replaced whole: the theta of the one that does not count does not count either.
        ({"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": LLAMA3}, LLAMA3),
        ({"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_theta": 7e5}}, {**LLAMA3, "rope_theta": 7e5}),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
            {**LLAMA3, "original_max_position_embeddings": 32},
        ),
        (
            {"rope_scaling": {name: LLAMA3[name] for name in LLAMA3 if "original" not in name}},
            {**LLAMA3, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_which_of_two_values_counts(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(config) == read({"rope_parameters": expected})
    check_table(config)


@pytest.mark.parametrize("kind", sorted({*ROPE_INIT_FUNCTIONS, "su", "x"} - {"llama3"}))
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_a_type_that_is_not_computed_is_named(kind: str, section: str) -> None:
    refused({section: {"rope_type": kind, "factor": 2.0}}, UnsupportedError, f"'{kind}' is not .*{section}")
    refused({section: {"type": kind, "factor": 2.0}}, UnsupportedError, f"'{kind}'")
    # The usual way to switch it on by hand, in a file of transformers 5.
    refused({"rope_parameters": DEFAULT, "rope_scaling": {"type": kind}}, UnsupportedError, f"'{kind}'")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 1.2}}, "attention_factor = 1.2 in rope_scaling"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention = "),
        ({"rope_parameters": {"rope_type": None}}, "type None"),
    ],
)
def test_what_is_not_computed_is_named(config: dict[str, Any], says: str) -> None:
    refused(config, UnsupportedError, says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor is missing"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": True}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor 1.0 is not below"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "original_max_position"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": -1}, "original_max_position"),
    ],
)
def test_a_number_that_is_none_is_named(config: dict[str, Any], says: str) -> None:
    refused(config, CheckpointError, says)


def check_table(config: dict[str, Any], head_dim: int = 32) -> None:
    """Of the same config the same table as transformers, or a refusal, or transformers fails."""
    try:
        ours = rope_table(read(config), head_dim, 64)
    except BedplateError:
        return
    try:
        given = toy_config(head_dim=head_dim).to_dict()
        del given["rope_parameters"]
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict({**given, **config}))
    except Exception:  # whatever it says of a value that is none
        return
    positions = torch.arange(64)[None]
    for table, expected in zip(ours, theirs(torch.zeros(1), positions), strict=True):
        # The same float32 operations; where a frequency's last bit differs (the order of two divisions), an angle
        # of up to 64 radians differs by 64 · 2⁻²³.
        torch.testing.assert_close(table[:, :, 0], expected, rtol=0, atol=64 * 2.0**-22)


ROPES = st.fixed_dictionaries(
    {
        "rope_theta": st.floats(100.0, 1e7),
        "factor": st.floats(1.0, 64.0),
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(3.0, 8.0),
        "original_max_position_embeddings": st.integers(16, 16384),
    }
)


KINDS = st.sampled_from(["default", "llama3", "llama3", "linear", "yarn", "dynamic"])
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": KINDS,
        "type": KINDS,
        "rope_theta": st.sampled_from([100.0, 5e5]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5, None]),
        "factor": st.sampled_from([1.0, 8]),
        "low_freq_factor": st.sampled_from([1.0, 2]),
        "high_freq_factor": st.sampled_from([4.0, 2]),
        "original_max_position_embeddings": st.sampled_from([16, 64]),
    },
)
LLAMA3_SECTIONS = SECTIONS.map(lambda section: {**LLAMA3, **section})
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": st.none() | SECTIONS | LLAMA3_SECTIONS,
        "rope_parameters": st.none() | SECTIONS | LLAMA3_SECTIONS,
        "rope_theta": st.sampled_from([200.0, 1e6]),
        "original_max_position_embeddings": st.sampled_from([32, 128]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5, None]),
    },
)


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS)
def test_any_mixture_of_spellings(config: dict[str, Any]) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        check_table(config)
    finally:
        logging.set_verbosity(verbosity)


@settings(max_examples=50, deadline=None)
@given(
    parameters=ROPES, head_dim=st.sampled_from([2, 8, 64, 128]), kind=st.sampled_from(["default", "llama3"])
)
def test_any_numbers(parameters: dict[str, Any], head_dim: int, kind: str) -> None:
    section = {"rope_type": kind, **(parameters if kind == "llama3" else {})}
    config = {"rope_parameters": {**section, "rope_theta": parameters["rope_theta"]}}
    read(config)  # not refused
    check_table(config, head_dim)
