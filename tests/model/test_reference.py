"""The float model that is read a layer at a time computes what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import reference, save_toy_model, toy_config

from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.reference import head_weight, hidden_states, logits
from bedplate.model.texts import sequences

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    ],
    ids=["plain", "biases", "llama3, untied"],
)
def test_logits_equal_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    save_toy_model(tmp_path / "model", toy_config(**changes))
    tokens = torch.randint(2, 320, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    texts = sequences(tokens, 70)
    assert [len(text) for text in texts] == [70, 30]
    checkpoint = open_checkpoint(tmp_path / "model")
    head = head_weight(checkpoint)
    model = reference(tmp_path / "model")
    for text, hidden in zip(texts, hidden_states(checkpoint, texts), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0]
        # float32 sums in another order: some 1e-7 of the largest logit for each of a few hundred additions.
        torch.testing.assert_close(
            torch.cat(list(logits(hidden, head, checkpoint.spec))),
            expected,
            rtol=0,
            atol=1e-5 * float(expected.abs().max()),
        )
