"""What calibration sees, and what it refuses to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bedplate.errors import CalibrationError, NotFoundError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import register_operators
from bedplate.model.load import float_decoder
from bedplate.quantize.calibration import FEW_TOKENS, SHIPPED_TEXT, calibration_texts, input_statistics

INPUTS = {
    "self_attn.q_proj": "self_attn.input_correction",
    "self_attn.o_proj": "self_attn.output_correction",
    "mlp.up_proj": "mlp.input_correction",
    "mlp.down_proj": "mlp.output_correction",
}


def test_statistics_are_those_of_the_linears_inputs(toy_model: Path) -> None:
    tokens = [
        int(token) for token in torch.randint(2, 320, (90,), generator=torch.Generator().manual_seed(0))
    ]
    checkpoint = open_checkpoint(toy_model)
    decoder = float_decoder(checkpoint, max_context=128)
    seen: dict[str, Tensor] = {}
    for layer, module in enumerate(decoder.layers):
        for name, place in INPUTS.items():

            def note(_: nn.Module, inputs: tuple[Tensor], path: str = f"layers.{layer}.{place}") -> None:
                seen[path] = inputs[0][0].square().mean(0).sqrt()

            module.get_submodule(name).register_forward_pre_hook(note)
    register_operators()
    with torch.no_grad():
        decoder(torch.tensor([tokens]), torch.tensor([0]), torch.tensor([0]))
    steps: list[tuple[int, int]] = []
    found = input_statistics(checkpoint, [tokens], lambda done, total: steps.append((done, total)))
    assert found.keys() == seen.keys()
    for path, expected in seen.items():
        torch.testing.assert_close(found[path], expected, rtol=1e-4, atol=1e-6)
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def texts_of(toy_model: Path, file: Path | None) -> tuple[list[list[int]], list[str]]:
    notices: list[str] = []
    tokenizer = (toy_model / "tokenizer.json").read_bytes()
    return calibration_texts(file, tokenizer, 256, notices.append), notices


def test_the_text_that_comes_with_bedplate_is_enough(toy_model: Path) -> None:
    texts, notices = texts_of(toy_model, None)
    assert sum(map(len, texts)) >= 2 * FEW_TOKENS and notices == []
    assert {len(text) for text in texts[:-1]} == {256}, "no more than the model has positions"
    assert SHIPPED_TEXT.read_text("utf-8").count("\n\n") > 10


def test_few_tokens_are_told(toy_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("the quick brown fox")
    (tokens,), notices = texts_of(toy_model, file)
    assert len(notices) == 1 and f"has {len(tokens)} tokens" in notices[0] and str(FEW_TOKENS) in notices[0]


def test_a_byte_order_mark_is_no_part_of_the_text(toy_model: Path, tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("the quick brown fox")
    marked.write_text("the quick brown fox", encoding="utf-8-sig")
    assert texts_of(toy_model, plain) == texts_of(toy_model, marked)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not text in UTF-8 (byte 0)"),
        (b"text and\0bytes", "NUL"),
    ],
)
def test_what_is_no_text_is_refused(toy_model: Path, tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        texts_of(toy_model, file)
    assert says in str(caught.value) and str(caught.value.where) == str(file) and caught.value.hint


def test_a_file_that_is_not_there(toy_model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        texts_of(toy_model, tmp_path / "none.txt")
