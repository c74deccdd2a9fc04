"""A program that was lowered with few rows of the vocabulary is the one that is lowered with all, to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_spec import SPEC

from bedplate.compile import lowering
from bedplate.compile.units import Structure
from bedplate.compile.vocabulary import FewRows, few_rows
from bedplate.link.linker import Template
from bedplate.link.template import template_of
from bedplate.quantize.recipe import make_recipe

WORDS, CONTEXT = 1500, 16
FLOAT_LAYERS = {"overrides": {"layers.*": "none"}}  # they are lowered sooner


def structure(words: int = WORDS, **recipe: Any) -> Structure:
    spec = replace(SPEC, vocab_size=words, logit_scale=0.5, logit_cap=3.0, layers=SPEC.layers[:1])
    made = make_recipe(**{"name": "8da4w", **recipe})
    return Structure(spec=spec, recipe=made, max_context=CONTEXT, max_chunk=CONTEXT, ranks={})


def program(of: Structure) -> Template:
    return template_of(lowering.compile_structure(of, of.unit_layers), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [FLOAT_LAYERS, {**FLOAT_LAYERS, "embedding": "4", "head": "8da4w"}, {"name": "none"}]
)
def test_programs_are_those_of_all_rows(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = structure(**recipe)
    assert few_rows(whole).few < WORDS / 2
    few = program(whole)
    monkeypatch.setattr(lowering, "few_rows", lambda given: FewRows(structure=given, few=WORDS, all=WORDS))
    all_rows = program(whole)
    assert (few.data, few.holes) == (all_rows.data, all_rows.holes)
    assert {name: one.key for name, one in few.fixed.items()} == {
        name: one.key for name, one in all_rows.fixed.items()
    }


def test_a_small_vocabulary_is_lowered_whole() -> None:
    small = structure(words=SPEC.vocab_size)
    assert few_rows(small).structure == small
