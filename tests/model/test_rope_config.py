"""RoPE in a config.json: in every spelling the tables of transformers, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_sections import DEFAULT, LLAMA3, LONGROPE, TYPES
from toy import toy_config
from transformers import LlamaConfig, StableLmConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding
from transformers.utils import logging

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.fields import Fields
from bedplate.model.parts import rope_table
from bedplate.model.rope_config import Rope, Rules, read_rope

MAX_POSITIONS = 256


def read(config: dict[str, Any], *, head_dim: int = 32, rules: Rules | None = None) -> Rope:
    fields = Fields({"rope_theta": 10000.0, **config}, "here/config.json")
    return read_rope(fields, ["any"], head_dim=head_dim, max_positions=MAX_POSITIONS, rules=rules or Rules())


def refused(config: dict[str, Any], kind: type[BedplateError], says: str, rules: Rules | None = None) -> None:
    with pytest.raises(kind, match=says) as caught:
        read(config, rules=rules)
    assert caught.value.where == "here/config.json" and caught.value.hint


def test_every_type_of_transformers_is_here() -> None:
    assert TYPES.keys() == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(
    "section", [section for sections in TYPES.values() for section in sections], ids=lambda s: str(s)[:70]
)
def test_the_tables_of_transformers(section: dict[str, Any]) -> None:
    section = {name: value for name, value in section.items() if value is not None or name == "factor"}
    read({"rope_parameters": section})  # not refused
    check_table({"rope_parameters": section}, must=True)
    check_table({"rope_scaling": section, "rope_theta": 5e5}, must=True)


@pytest.mark.parametrize("partial", [0.25, 0.5, 0.35, 1.0])
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_only_the_first_rows_turn(kind: str, partial: float) -> None:
    section = {**TYPES[kind][0], "partial_rotary_factor": partial}
    if (kind, partial) == ("yarn", 0.35):  # an odd number of rows, with which transformers fails
        refused({"rope_parameters": section}, CheckpointError, "give no RoPE", Rules(partial=True))
        return
    rope = read({"rope_parameters": section}, rules=Rules(partial=True, interleaved=True))
    assert rope.rows.interleaved
    config = StableLmConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_theta": 10000.0, **section},
    )
    expected = StableLmRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    assert rope.rows.width == expected[0].shape[-1]
    half = rope.rows.width // 2
    for table, theirs in zip(rope_table(rope.tables["any"], 64), expected, strict=True):
        turning = torch.cat((table[:, :, 0, :half], table[:, :, 0, 16 : 16 + half]), dim=-1)
        torch.testing.assert_close(turning, theirs, rtol=0, atol=64 * 2.0**-22)
    still = rope.tables["any"].frequencies[half:]
    assert still == (0.0,) * (16 - half)


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
    assert read(spelling) == read({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}})


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
    assert read(spelling).tables["any"].frequencies[8] == pytest.approx(1e-3)
    check_table(spelling, must=True)


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
    check_table(config, must=True)


@pytest.mark.parametrize("kind", ["su", "x", "axial"])
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
        ({"rope_scaling": {**LLAMA3, "mrope_section": [1]}}, r"mrope_section = \[1\] in rope_scaling"),
        ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention = "),
        ({"rope_parameters": {"rope_type": None}}, "type None"),
    ],
)
def test_what_is_not_computed_is_named(config: dict[str, Any], says: str) -> None:
    refused(config, UnsupportedError, says)


@pytest.mark.parametrize("partial", [1.5, 0.01])
def test_more_rows_than_a_head_has_or_none(partial: float) -> None:
    section = {"rope_parameters": {"partial_rotary_factor": partial}}
    refused(section, UnsupportedError, "partial_rotary_factor", Rules(partial=True))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor in rope_scaling is missing",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor in rope_scaling is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor in rope_scaling is missing"),
        ({"rope_theta": None}, "rope_theta in rope_parameters is missing"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor in rope_scaling is missing"),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0]}},
            "short_factor in rope_scaling must be a list of 16",
        ),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 16}}, r"long_factor\[0\]"),
        ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "give no RoPE"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": True}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor 1.0 is not below"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64.5}}, "original_max_position"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": -1}, "original_max_position"),
    ],
)
def test_a_number_that_is_none_is_named(config: dict[str, Any], says: str) -> None:
    refused(config, CheckpointError, says)


def check_table(config: dict[str, Any], head_dim: int = 32, *, must: bool = False) -> None:
    """Of the same config the same table as transformers, or a refusal, or transformers fails; `must`: the first."""
    length = MAX_POSITIONS
    try:
        table = read(config, head_dim=head_dim).tables["any"]
    except BedplateError:
        assert not must
        return
    try:
        given = toy_config(head_dim=head_dim, max_position_embeddings=MAX_POSITIONS).to_dict()
        del given["rope_parameters"]
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict({**given, **config}))
    except Exception:  # whatever it says of a value that is none
        assert not must
        return
    for length in (16, MAX_POSITIONS):
        expected = theirs(torch.zeros(1), torch.arange(length)[None])
        for ours, wanted in zip(rope_table(table, length), expected, strict=True):
            # The same float32 operations; where a frequency's last bit differs (the order of two divisions), an angle
            # differs by as much relative to it.
            atol = max(1.0, table.scale) * length * 2.0**-22
            torch.testing.assert_close(ours[:, :, 0], wanted, rtol=0, atol=atol)


ROPES = st.fixed_dictionaries(
    {
        "rope_theta": st.floats(100.0, 1e7),
        "factor": st.floats(1.0, 64.0),
        "low_freq_factor": st.floats(0.5, 2.0),
        "high_freq_factor": st.floats(3.0, 8.0),
        "original_max_position_embeddings": st.integers(16, 16384),
    }
)


KINDS = st.sampled_from([*TYPES, "llama3"])
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
        "attention_factor": st.sampled_from([1.5, 2]),
        "beta_fast": st.sampled_from([20, 0.5]),
        "mscale": st.sampled_from([0.5, 0]),
        "mscale_all_dim": st.sampled_from([1.0]),
        "truncate": st.booleans(),
    },
)
FULL_SECTIONS = st.builds(
    lambda base, section: {**base, **section}, st.sampled_from([LLAMA3, LONGROPE]), SECTIONS
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": st.none() | SECTIONS | FULL_SECTIONS,
        "rope_parameters": st.none() | SECTIONS | FULL_SECTIONS,
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
