"""How large the inputs of the linears are: the float model over a text, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from bedplate.errors import CalibrationError, NotFoundError
from bedplate.model.checkpoint import Checkpoint
from bedplate.model.reference import hidden_states, sequences

SHIPPED_TEXT = Path(__file__).with_name("calibration.txt")
FEW_TOKENS = 512  # fewer than this are said to be few
MOST_TOKENS = 8192  # of a longer text the beginning counts: all its hidden states are in memory at once
SEQUENCE = 512

# Root mean square of each column of a linear's input, float32 [columns], by the module path of its correction.
Statistics = Mapping[str, Tensor]


def calibration_tokens(
    text_file: Path | None, tokenizer_json: bytes, notice: Callable[[str], None]
) -> list[int]:
    """Tokens of a calibration text; None: of the one that comes with bedplate. `notice` is told if they are few.

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
    tokens = list(Tokenizer.from_str(tokenizer_json.decode()).encode(text, add_special_tokens=False).ids)
    if not text.strip() or len(tokens) < 2:
        raise CalibrationError("holds no text", where=path, hint=hint)
    if len(tokens) < FEW_TOKENS:
        notice(
            f"the calibration text has {len(tokens)} tokens: with fewer than {FEW_TOKENS}, what it measures is rough"
        )
    return tokens[:MOST_TOKENS]


def input_statistics(
    checkpoint: Checkpoint, tokens: list[int], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Statistics of every layer. progress(done, total) counts layers. Raises CheckpointError."""
    sums: dict[str, Tensor] = {}

    def note(layer: int, place: str, x_SD: Tensor) -> None:
        path = f"layers.{layer}.{place}"
        sums[path] = sums.get(path, torch.zeros(x_SD.shape[1])) + x_SD.square().sum(0)

    hidden_states(checkpoint, sequences(tokens, SEQUENCE), note=note, progress=progress)
    return {path: (total / len(tokens)).sqrt() for path, total in sums.items()}
