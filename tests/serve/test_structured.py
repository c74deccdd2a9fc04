"""Answers that a grammar allows."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import KINDS

import bedplate
from bedplate.runtime.sampling import ForcingMask
from bedplate.runtime.tokenizer import Tokenizer
from bedplate.serve.errors import ApiError
from bedplate.serve.structured import Constrained, Grammar, Guide, grammar_of, schema_part
from bedplate.serve.vocabulary import vocabulary_of

MESSAGES: list[Any] = [{"role": "user", "content": "the fox"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["fox", "<|im_end|>", "\U0001f98a"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


class Plain:
    """A mask that does not say what it forces."""

    def __init__(self, mask: ForcingMask) -> None:
        self._mask = mask

    def __call__(self, chosen: tuple[int, ...]) -> Any:
        return self._mask(chosen)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    toy = KINDS[kind]()
    ends = [toy.backend.token_to_id(toy.theirs.eos_token)]
    return Tokenizer(toy.backend, chat_template=None, special_tokens={}, end_ids=ends)


def guide(tokenizer: Tokenizer, **fields: Any) -> Guide:
    grammar = grammar_of(Constrained(model="m", **fields))
    assert grammar is not None
    return Guide(tokenizer, grammar)


def allowed(mask: bytes) -> list[int]:
    found: list[int] = np.flatnonzero(
        np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    ).tolist()
    return found


def walk(tokenizer: Tokenizer, guide: Guide, seed: int) -> str:
    """What a model says that chooses any token that is allowed."""
    mask, chosen, random_ = guide(), list[int](), random.Random(seed)
    while True:
        forced = mask.forced(tuple(chosen), 9)
        tokens = allowed(mask(tuple(chosen)))
        assert tokens == forced[:1] or not forced
        token = random_.choice(tokens)
        if token in tokenizer.end_ids:
            return tokenizer.decode(chosen)
        chosen.append(token)
        assert len(chosen) < 2000


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.text(st.sampled_from('abé "\\<|>{}x'), max_size=4)
    leaves = st.one_of(
        st.integers(0, 4).map(lambda n: {"type": "string", "maxLength": n}),
        st.tuples(st.integers(-50, 5), st.integers(5, 99)).map(
            lambda ends: {"type": "integer", "minimum": ends[0], "maximum": ends[1]}
        ),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, None]}}]),
        st.sampled_from(
            [{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"type": "string", "format": "date"}]
        ),
        st.lists(names | st.integers(-(2**53), 2**53) | st.none(), min_size=1, max_size=3).map(
            lambda some: {"enum": some}
        ),
    )

    def deeper(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        lists = st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 1}
        )
        return (
            lists | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}) | objects(inner)
        )

    def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.dictionaries(names, inner, max_size=3).flatmap(
            lambda fields: st.sets(st.sampled_from(sorted(fields)) if fields else st.nothing()).map(
                lambda required: {
                    "type": "object",
                    "properties": fields,
                    "required": sorted(required),
                    "additionalProperties": False,
                }
            )
        )

    return st.recursive(leaves, deeper, max_leaves=5)


USABLE = [kind for kind in KINDS if kind != "unigram"]


@pytest.mark.parametrize("kind", USABLE)
def test_whatever_the_model_says_a_schema_allows_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=30 if kind == "smollm2" else 80, deadline=None)
    @given(schema=schemas(), seed=st.integers(0, 1000))
    def check(schema: dict[str, Any], seed: int) -> None:
        text = walk(tokenizer, Guide(tokenizer, Grammar([schema_part(schema, "x")], "x")), seed)
        value = json.loads(text)
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
        assert text == json.dumps(value, ensure_ascii=False) or "\\" in text or "-0" in text

    check()


@pytest.mark.parametrize("kind", USABLE)
def test_regexes_choices_and_grammars(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    choices = ['the "fox', "é\n<|end|>", "\U0001f98a", "the", "<|end|>a</s>", "<|im_end|><|eot_id|>", "a\x7f"]
    for seed in range(9):
        made = guide(tokenizer, structured_outputs={"regex": r"a/[bé]{2,3}\.(x|y)"})
        assert re.fullmatch(r"a/[bé]{2,3}\.(x|y)", walk(tokenizer, made, seed))
        assert walk(tokenizer, guide(tokenizer, structured_outputs={"choice": choices}), seed) in choices
        made = guide(tokenizer, structured_outputs={"grammar": 'start: "<" /[0-9]{2}/ end\nend: ">"'})
        assert re.fullmatch("<[0-9]{2}>", walk(tokenizer, made, seed))


def test_an_end_token_is_allowed_where_the_grammar_can_end(alone: bedplate.Engine) -> None:
    tokenizer = alone.tokenizer
    mask = guide(tokenizer, structured_outputs={"regex": "ab?c"})()
    a, b, c = (tokenizer.encode(one)[0] for one in "abc")
    (end,) = tokenizer.end_ids
    assert mask.forced((), 5) == allowed(mask(())) == [a]
    assert mask.forced((a,), 5) == [] and allowed(mask((a,))) == sorted([b, c])
    assert allowed(mask((a, c))) == [end]
    mask = guide(tokenizer, structured_outputs={"regex": "ab*"})()
    assert mask((a,)) == mask((a, b)) and allowed(mask((a, b))) == sorted([b, end])
    with pytest.raises(ApiError, match=r"The grammar cannot be followed: .*\(hint: ") as caught:
        mask((a, b, c))
    assert caught.value.param == "structured_outputs.regex"


def test_a_vocabulary_is_made_once_for_a_tokenizer(toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle, threads=1) as engine:
        base = engine.tokenizer
        made: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda name=name: made.append(vocabulary_of(engine.tokenizer_of(name), "tools"))
            )
            for name in (None, "all", "all2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(one is vocabulary_of(base, "tools") for one in made)


def test_a_tokenizer_without_end_or_of_another_kind() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    toy = KINDS["smollm2"]()
    endless = Tokenizer(toy.backend, chat_template=None, special_tokens={})
    with pytest.raises(ApiError, match="no end token"):
        guide(endless, response_format={"type": "json_object"})()
    words = Backend(models.WordLevel({"the": 0, "</s>": 1}, unk_token="the"))
    for other in (
        Tokenizer(words, chat_template=None, special_tokens={}, end_ids=[1]),
        tokenizer_of("unigram"),
    ):
        with pytest.raises(ApiError, match="cannot be used with the tokenizer of this model"):
            guide(other, response_format={"type": "json_object"})()


def test_deep_and_long_grammars_are_no_danger() -> None:
    tokenizer = tokenizer_of("smollm2")
    names = [f"d{i}" for i in range(2000)]
    inner = {name: {"items": {"$ref": f"#/$defs/{after}"}} for name, after in pairwise(names)}
    deep = schema_part({"$ref": "#/$defs/d0", "$defs": {**inner, names[-1]: {"type": "null"}}}, "x")
    assert Guide(tokenizer, Grammar([deep], "x"))() is not None
    rules = "\n".join(f"a{i}:a{i + 1}" for i in range(8000))
    assert Guide(tokenizer, Grammar([{"lark_grammar": f'start:a0\n{rules}\na8000:"x"'}], "x"))() is not None
    with pytest.raises(ApiError, match="more than 131072 characters"):
        Guide(tokenizer, Grammar([{"lark_grammar": f"start: {'(' * 200_000}"}], "x"))()
    with pytest.raises(ApiError, match="too deeply nested"):
        Guide(tokenizer, Grammar([{"lark_grammar": f"start: {'(' * 100_000}"}], "x"))()


@pytest.mark.parametrize("temperature", [0, 1])
def test_fewer_steps_and_the_same_text(alone: bedplate.Engine, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    made = guide(alone.tokenizer, response_format=form)
    found = []
    for mask in (made(), Plain(made())):
        session = alone.session("all")
        options: dict[str, Any] = {"max_tokens": 100, "temperature": temperature, "seed": 5}
        found.append(list(session.events("the fox", mask=mask, logprobs=1, **options)))
        assert session.last is not None
        steps = session.last.generated_tokens - session.last.accepted_tokens
        assert (steps < session.last.generated_tokens / 2) == isinstance(mask, ForcingMask)
    assert found[0] == found[1]
    jsonschema.validate(json.loads("".join(event.text for event in found[0])), SCHEMA)


class TestServed:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_schema(self, client: openai.OpenAI, stream: bool) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
        options: dict[str, Any] = {
            "messages": MESSAGES,
            "max_tokens": 100,
            "temperature": 1,
            "seed": 2,
            "n": 3,
        }
        said = client.chat.completions.create(model="all", response_format=form, stream=stream, **options)
        if stream:
            texts = ["", "", ""]
            for piece in said:  # type: ignore[union-attr]
                for choice in piece.choices:  # type: ignore[union-attr]
                    texts[choice.index] += choice.delta.content or ""  # type: ignore[union-attr]
        else:
            assert [choice.finish_reason for choice in said.choices] == ["stop"] * 3  # type: ignore[union-attr]
            assert said.model_extra["timings"]["draft_n_accepted"] > 20  # type: ignore[union-attr, index]
            texts = [choice.message.content for choice in said.choices]  # type: ignore[union-attr]
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)

    def test_in_batches_and_alone_the_text_is_the_same(self, client: openai.OpenAI) -> None:
        """Masks are of their own answers."""
        bodies: list[dict[str, Any]] = [
            {"regex": "[abc]{9}"}, {"choice": ["the fox", "a dog"]}, {"json": SCHEMA}, {"grammar": 'start: /x{3,9}/'}
        ] * 2  # fmt: skip

        def ask(outputs: Mapping[str, Any]) -> str:
            said = client.completions.create(
                model="all", prompt="fox", max_tokens=80, seed=1, extra_body={"structured_outputs": outputs}
            )
            return said.choices[0].text

        expected = [ask(one) for one in bodies]
        found = dict[int, str]()
        threads = [
            threading.Thread(target=lambda i=i, one=one: found.update({i: ask(one)}))
            for i, one in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(len(bodies))] == expected

    def test_parsed_by_the_client(self, client: openai.OpenAI) -> None:
        from pydantic import BaseModel, Field

        class Animal(BaseModel):
            legs: int = Field(ge=0, le=9)
            kind: str = Field(max_length=3)

        said = client.chat.completions.parse(
            model="all2", messages=MESSAGES, response_format=Animal, max_tokens=60, temperature=1, seed=1
        )
        assert isinstance(said.choices[0].message.parsed, Animal)

    def test_any_object_and_any_text(self, client: openai.OpenAI, alone: bedplate.Engine) -> None:
        options: dict[str, Any] = {"model": "all", "messages": MESSAGES, "max_tokens": 12}
        said = client.chat.completions.create(
            response_format={"type": "json_object"},
            logit_bias={str(alone.tokenizer.encode("}")[0]): 100},
            **options,
        )
        assert said.choices[0].message.content == "{}"
        said = client.chat.completions.create(response_format={"type": "text"}, temperature=0, **options)
        assert said.choices[0].message.content == alone.session("all").generate(MESSAGES, max_tokens=12)

    @pytest.mark.parametrize(
        ("fields", "param", "what"),
        [
            ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
            ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
            ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown name"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
            ({"structured_outputs": {}}, "structured_outputs", "one of"),
            ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
            (
                {"structured_outputs": {"whitespace_pattern": " "}},
                "structured_outputs.whitespace_pattern",
                "honours",
            ),
            (
                {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
                "structured_outputs",
                "not both",
            ),
            ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "not"),
            ({"response_format": {"type": "xml"}}, "response_format", "xml"),
            (
                {"response_format": {"type": "json_schema"}},
                "response_format.json_schema",
                "required",
            ),
            (
                {"response_format": {"type": "json_object"}, "ignore_eos": True},
                "ignore_eos",
                "the grammar ends",
            ),
            ({"response_format": {"type": "json_object"}, "min_tokens": 4}, "min_tokens", "the grammar ends"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_wrong(
        self, client: openai.OpenAI, fields: dict[str, Any], param: str, what: str, stream: bool
    ) -> None:
        with pytest.raises(openai.BadRequestError, match=what) as caught:
            client.chat.completions.create(model="all", messages=MESSAGES, stream=stream, extra_body=fields)
        assert caught.value.param == param

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "array", "uniqueItems": True},
            {"type": "array", "contains": {"type": "null"}},
            {"not": {"type": "null"}},
            {"enum": [2**53 + 1]},
            {"type": "string", "pattern": "(?=a)b"},
            {"type": "string", "format": "poem"},
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            {"if": {"type": "string"}, "then": {"minLength": 3}},
            {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}},
        ],
    )
    def test_strict_refuses_what_would_be_ignored(
        self, client: openai.OpenAI, schema: dict[str, Any]
    ) -> None:
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="all", messages=MESSAGES, response_format=form)
        assert caught.value.param == "response_format"

    def test_without_strict_it_is_ignored(self, client: openai.OpenAI) -> None:
        schema = {"oneOf": [{"const": 1}, {"enum": [1]}], "not": {"type": "null"}}
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        said = client.chat.completions.create(
            model="all", messages=MESSAGES, response_format=form, max_tokens=9
        )
        assert said.choices[0].message.content == "1"
