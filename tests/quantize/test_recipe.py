"""Recipes: rules as data, in order; a typo is an error, not another recipe."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bedplate
from bedplate.bundle import strict_json
from bedplate.errors import RecipeError
from bedplate.quantize.recipe import (
    EIGHT_BIT,
    FLOAT,
    WEIGHT_ONLY,
    Recipe,
    Rule,
    Scheme,
    make_recipe,
)

FOUR_BIT = Scheme(bits=4, group_size=32, method="hqq")


def refused(says: str, name: str = "8da4w", **options: Any) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        make_recipe(name, **options)
    assert caught.value.hint


def test_4_bits_with_the_head_in_8() -> None:
    recipe = make_recipe("8da4w", method="hqq")
    assert recipe.scheme_of("layers.0.mlp.up_proj") == FOUR_BIT
    assert recipe.scheme_of("lm_head") == EIGHT_BIT
    assert recipe.embedding == EIGHT_BIT
    assert recipe.adapter_scheme() == FLOAT


def test_build_and_recipes_have_the_same_defaults() -> None:
    ours, of_build = (inspect.signature(one).parameters for one in (make_recipe, bedplate.build))
    shared = ours.keys() & of_build.keys()
    assert shared >= {"group_size", "method", "embedding", "head", "overrides", "recovery_rank"}
    assert {name: ours[name].default for name in shared} == {name: of_build[name].default for name in shared}


@pytest.mark.parametrize(("name", "scheme"), [("8da8w", EIGHT_BIT), ("none", FLOAT)])
def test_one_scheme_for_all(name: str, scheme: Scheme) -> None:
    recipe = make_recipe(name)
    assert {recipe.scheme_of("layers.0.mlp.up_proj"), recipe.scheme_of("lm_head"), recipe.embedding} == {
        scheme
    }


@pytest.mark.parametrize(("head", "bits"), [("8da4w", 4), ("8da8w", 8), ("none", None), (None, 8)])
def test_the_head_by_itself(head: str | None, bits: int | None) -> None:
    assert make_recipe("8da4w", head=head).scheme_of("lm_head").bits == bits


def test_a_head_that_was_asked_for_is_no_default() -> None:
    assert make_recipe("8da4w").is_default_of("lm_head")
    assert make_recipe("8da4w").with_head_as_rest().scheme_of("lm_head").bits == 4
    for head in ("8da4w", "8da8w"):
        asked = make_recipe("8da4w", head=head)
        assert not asked.is_default_of("lm_head")
        assert asked.with_head_as_rest().scheme_of("lm_head") == asked.scheme_of("lm_head")


def test_options_reach_the_scheme() -> None:
    recipe = make_recipe("8da4w", group_size=64, method="plain", embedding="4", adapter="8w")
    assert recipe.scheme_of("layers.0.mlp.up_proj") == Scheme(bits=4, group_size=64, method="plain")
    assert recipe.embedding == Scheme(bits=4, group_size=32)
    assert recipe.adapter_scheme() == WEIGHT_ONLY
    assert make_recipe("8da4w", group_size=0).scheme_of("x").group_size is None
    assert make_recipe("8da8w", embedding="float").embedding == FLOAT


def test_the_first_rule_that_matches_decides() -> None:
    overrides = {"layers.*.mlp.down_proj": "8da8w", "layers.*.mlp.*": "none", "*down_proj": "8da4w"}
    recipe = make_recipe("8da4w", method="hqq", overrides=overrides)
    assert recipe.scheme_of("layers.7.mlp.down_proj") == EIGHT_BIT
    assert recipe.scheme_of("layers.7.mlp.up_proj") == FLOAT
    assert recipe.scheme_of("layers.7.self_attn.q_proj") == FOUR_BIT
    assert make_recipe("8da4w", overrides={"*": "none"}).scheme_of("lm_head") == FLOAT


def test_patterns_are_of_the_whole_path_and_of_its_case() -> None:
    overrides = {"mlp": "none", "*.MLP.*": "none", "layers.?.self_attn.q_proj": "8da8w"}
    recipe = make_recipe("8da4w", method="hqq", overrides=overrides)
    assert recipe.scheme_of("layers.7.mlp.up_proj") == FOUR_BIT
    assert recipe.scheme_of("layers.7.self_attn.q_proj") == EIGHT_BIT
    assert recipe.scheme_of("layers.17.self_attn.q_proj") == FOUR_BIT


def test_no_rule_for_a_linear() -> None:
    recipe = Recipe(
        name="x",
        rules=(Rule(pattern="layers.*", scheme=FLOAT),),
        defaults=(),
        embedding=FLOAT,
        adapter="none",
    )
    with pytest.raises(RecipeError, match="no rule") as caught:
        recipe.scheme_of("lm_head")
    assert caught.value.where == "lm_head" and caught.value.hint


@pytest.mark.parametrize("name", ["8da2w", "int4", "", "8DA4W"])
def test_an_unknown_scheme(name: str) -> None:
    refused("unknown quantization", name)
    refused("unknown quantization", overrides={"lm_head": name})
    if name:
        refused("unknown quantization", head=name)


@pytest.mark.parametrize("group_size", [-32, 1, 16, 33, 48])
def test_a_group_size_that_xnnpack_does_not_take(group_size: int) -> None:
    refused(f"group size {group_size} is not supported", group_size=group_size)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "gptq"}, "unknown method 'gptq'"),
        ({"embedding": "2"}, "unknown bits of the embedding '2'"),
        ({"embedding": 8}, "unknown bits of the embedding 8"),
        ({"adapter": "8da4w"}, "unknown quantization of adapters '8da4w'"),
    ],
)
def test_an_unknown_option(options: dict[str, Any], says: str) -> None:
    refused(says, **options)


def test_an_adapter_scheme_that_is_none() -> None:
    wrong: Any = "8da4w"
    with pytest.raises(RecipeError, match="unknown quantization of adapters"):
        make_recipe("8da4w").for_adapter(wrong)


def test_an_adapters_scheme_changes_nothing_else() -> None:
    recipe = make_recipe("8da4w")
    changed = recipe.for_adapter("8w")
    assert replace(changed, adapter=recipe.adapter) == recipe
    assert changed.adapter_scheme() == WEIGHT_ONLY and changed.for_adapter("none") == recipe


SCHEMES = st.sampled_from(["8da4w", "8da8w", "none"])


@given(
    name=SCHEMES,
    group_size=st.sampled_from([0, 32, 64, 128]),
    method=st.sampled_from(["plain", "hqq", "offset"]),
    recovery_rank=st.sampled_from([0, 16]),
    embedding=st.sampled_from(["4", "8", "float"]),
    head=st.none() | SCHEMES,
    overrides=st.dictionaries(st.text(max_size=8), SCHEMES, max_size=4),
    adapter=st.sampled_from(["none", "8w"]),
)
def test_a_manifest_gives_the_recipe_back(name: str, **options: Any) -> None:
    recipe = make_recipe(name, **options)
    assert strict_json.decode(Recipe, json.loads(json.dumps(recipe.to_dict())), "recipe") == recipe
