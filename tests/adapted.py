"""What the constants of a bundle's adapter amount to: logits of the float model with all of it merged in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import bedplate
from bedplate.assemble.adapted import Adapted
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.reference import head_bias, head_weight, hidden_states, logits


def logits_with(bundle: bedplate.Bundle, adapter: str, model: Path, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [T, vocab] of the bundle's adapter on the checkpoint that the bundle was built from."""
    with Adapted(open_checkpoint(model), bundle.adapters[adapter], bundle.foundation) as adapted:
        (hidden,) = hidden_states(adapted, [list(tokens)])
        return torch.cat(list(logits(hidden, head_weight(adapted), adapted.spec, bias=head_bias(adapted))))
