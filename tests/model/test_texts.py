"""Long texts as sequences of tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bedplate.model.texts import sequences, texts_of


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A word is a token: a is 3, b is 4 …"""
    ids = {word: at for at, word in enumerate(["<s>", "</s>", "?", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def begins_with(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_sequences() -> None:
    assert sequences(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert sequences(range(5), 3, [9]) == [[9, 0, 1], [9, 2, 3], [9, 4]]
    assert sequences([], 3, [9]) == []


def test_one_token_after_nothing_predicts_nothing(tokenizer: Tokenizer) -> None:
    assert texts_of(tokenizer, "a b c d e", 2) == [[3, 4], [5, 6]]
    assert texts_of(tokenizer, "a", 2) == texts_of(tokenizer, "", 2) == []


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_each_sequence_begins_as_the_tokenizer_begins_a_text(tokenizer: Tokenizer, template: str) -> None:
    begun = begins_with(tokenizer, template)
    assert texts_of(begun, "a b c d e", 3) == [[0, 3, 4], [0, 5, 6], [0, 7]]
    assert texts_of(begun, "a b c d e", 3, most=3) == [[0, 3, 4], [0, 5]]
    assert texts_of(begun, "", 3) == []


def test_an_end_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    assert texts_of(begins_with(tokenizer, "$A </s>"), "a b c", 3) == [[3, 4, 5]]
