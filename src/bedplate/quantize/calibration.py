"""How large the inputs of the linears are: the float model over a text, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bedplate.errors import CalibrationError, NotFoundError
from bedplate.model.checkpoint import Checkpoint
from bedplate.model.reference import hidden_states
from bedplate.model.texts import texts_of

SHIPPED_TEXT = Path(__file__).with_name("calibration.txt")
FEW_TOKENS = 512  # fewer than this are said to be few
MOST_TOKENS = 8192  # of a longer text the beginning counts: all its hidden states are in memory at once
SEQUENCE = 512

# Root mean square of each column of a linear's input, float32 [columns], by the module path of its correction.
Statistics = Mapping[str, Tensor]


def calibration_texts(
    text_file: Path | None, tokenizer_json: bytes, max_positions: int, notice: Callable[[str], None]
) -> list[list[int]]:
    """A calibration text (None: the one that comes with bedplate) in sequences of tokens that a model of so many
    positions can read. `notice` is told if they are few.

    NotFoundError: there is no such file.  CalibrationError: it is empty, or no text in UTF-8.
    """
    path = text_file or SHIPPED_TEXT
    if not path.is_file():
        raise NotFoundError(
            "no such file", where=path, hint="give a text file in UTF-8, or leave out --calibration"
        )
    hint = "give prose, code or conversations of the kind that the model will read, some thousand words"
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\N{BYTE ORDER MARK}")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"is not text in UTF-8 (byte {error.start})", where=path, hint=hint) from None
    if "\0" in text:
        raise CalibrationError("holds NUL bytes: it is binary data, not text", where=path, hint=hint)
    texts = texts_of(
        Tokenizer.from_str(tokenizer_json.decode()), text, min(SEQUENCE, max_positions), most=MOST_TOKENS
    )
    count = sum(map(len, texts))
    if not text.strip() or not texts:
        raise CalibrationError("holds no text", where=path, hint=hint)
    if count < FEW_TOKENS:
        notice(
            f"the calibration text has {count} tokens: with fewer than {FEW_TOKENS}, what it measures is rough"
        )
    return texts


def input_statistics(
    checkpoint: Checkpoint, texts: Sequence[Sequence[int]], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Statistics of every layer. progress(done, total) counts layers. Raises CheckpointError."""
    sums: dict[str, Tensor] = {}

    def note(layer: int, place: str, x_SD: Tensor) -> None:
        path = f"layers.{layer}.{place}"
        sums[path] = sums.get(path, torch.zeros(x_SD.shape[1])) + x_SD.square().sum(0)

    hidden_states(checkpoint, texts, note=note, progress=progress)
    count = sum(map(len, texts))
    return {path: (total / count).sqrt() for path, total in sums.items()}
