"""The decoder's logits against transformers', and with branches against PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import LLAMA3
from small_spec import LINEARS
from torch import Tensor
from toy import reference, save_adapter, save_toy_model, toy_config

from bedplate.model.adapter import read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.model.load import float_decoder, set_parameter

TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 320, 48)]


def logits(
    decoder: Decoder, tokens: Sequence[int], chunks: Sequence[int], *, all_rows: bool = True
) -> Tensor:
    """Logits [T, V] of `tokens`, fed in chunks of these lengths; or [chunks, V] of the last of each."""
    decoder.reset_cache()
    rows, position = [], 0
    with torch.no_grad():
        for length in chunks:
            chunk = torch.tensor([tokens[position : position + length]])
            wanted = torch.zeros(length if all_rows else 1)
            rows.append(decoder(chunk, torch.tensor([position]), wanted)[0])
            position += length
    assert position == len(tokens)
    return torch.cat(rows)


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    # The sums are the same, of at most 128 terms, but in another order: some 2⁻²⁴ of their size for each, through
    # three layers. Models that differ in any one part differ by whole units.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"mlp_bias": True, "attention_bias": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"head_dim": 16, "num_attention_heads": 2, "rms_norm_eps": 1e-2},
        {"num_hidden_layers": 1},
    ],
    ids=[
        "grouped-query",
        "multi-head",
        "multi-query",
        "untied",
        "attention bias",
        "biases",
        "llama3",
        "theta",
        "narrow heads",
        "one layer",
    ],
)
def test_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    save_toy_model(tmp_path, toy_config(**changes))
    with torch.no_grad():
        expected = reference(tmp_path)(torch.tensor([TOKENS])).logits[0]
    decoder = float_decoder(open_checkpoint(tmp_path), max_context=64)
    count = len(TOKENS)
    assert_same_logits(logits(decoder, TOKENS, [count]), expected)
    assert_same_logits(logits(decoder, TOKENS, [7, 1, 16, count - 24]), expected)
    assert_same_logits(logits(decoder, TOKENS, [1] * count), expected)


def test_biases_are_not_zero_where_they_are_compared(tmp_path: Path) -> None:
    save_toy_model(tmp_path, toy_config(attention_bias=True, mlp_bias=True))
    decoder = float_decoder(open_checkpoint(tmp_path), max_context=64)
    biases = {name: value for name, value in decoder.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 3 * len(LINEARS)
    assert all(value.abs().min() > 0 for value in biases.values())


def test_the_last_rows_are_those_of_all(toy_model: Path) -> None:
    decoder = float_decoder(open_checkpoint(toy_model), max_context=64)
    chunks = [16, 1, 31]
    every = logits(decoder, TOKENS, chunks)
    last = logits(decoder, TOKENS, chunks, all_rows=False)
    assert_same_logits(last, every[[15, 16, 47]])


def test_what_was_in_the_cache_before_does_not_show(toy_model: Path) -> None:
    decoder = float_decoder(open_checkpoint(toy_model), max_context=64)
    once = logits(decoder, TOKENS, [48])
    logits(decoder, TOKENS[::-1], [48])
    assert torch.equal(logits(decoder, TOKENS, [48]), once)
    for layer in decoder.layers:
        layer.k_cache.fill_(1e3)  # positions that are to be overwritten, or lie ahead
    with torch.no_grad():
        assert_same_logits(decoder(torch.tensor([TOKENS]), torch.tensor([0]), torch.zeros(48))[0], once)


def test_beyond_the_context_is_our_bug(toy_model: Path) -> None:
    decoder = float_decoder(open_checkpoint(toy_model), max_context=16)
    with pytest.raises(RuntimeError), torch.no_grad():
        decoder(torch.tensor([TOKENS[:8]]), torch.tensor([9]), torch.zeros(1))


@pytest.mark.parametrize("name", ["all", "qv"])
def test_with_branches_equals_peft(name: str, toy_model: Path, toy_adapters: dict[str, Path]) -> None:
    check_adapter(toy_model, toy_adapters[name])


@pytest.mark.parametrize("alpha", [0.5, 3, 64])
def test_any_scaling_equals_peft(alpha: float, toy_model: Path, tmp_path: Path) -> None:
    """lora_alpha has no place in the decoder: it is folded into B."""
    folder = save_adapter(tmp_path / "adapter", toy_model, seed=5, rank=3, targets=["down_proj", "o_proj"])
    config = (folder / "adapter_config.json").read_text()
    assert '"lora_alpha": 6' in config
    (folder / "adapter_config.json").write_text(config.replace('"lora_alpha": 6', f'"lora_alpha": {alpha}'))
    check_adapter(toy_model, folder)


def test_branches_beside_biases_equal_peft(tmp_path: Path) -> None:
    save_toy_model(tmp_path / "model", toy_config(attention_bias=True, mlp_bias=True))
    check_adapter(tmp_path / "model", save_adapter(tmp_path / "adapter", tmp_path / "model", seed=6))


def check_adapter(model: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(model)
    adapter = read_adapter(folder, checkpoint.spec)
    decoder = float_decoder(checkpoint, max_context=64, ranks=adapter.ranks)
    base = logits(float_decoder(checkpoint, max_context=64), TOKENS, [48])
    assert_same_logits(logits(decoder, TOKENS, [48]), base)  # branches start as no-ops
    for path, a, b in adapter.matrices():
        set_parameter(decoder, f"{path}.lora_a.weight", torch.from_numpy(a))
        set_parameter(decoder, f"{path}.lora_b.weight", torch.from_numpy(b))
    with torch.no_grad():
        expected = reference(model, folder)(torch.tensor([TOKENS])).logits[0]
    assert float((expected - base).abs().max()) > 0.01 * float(expected.abs().max())
    assert_same_logits(logits(decoder, TOKENS, [48]), expected)
    assert_same_logits(logits(decoder, TOKENS, [5, *[1] * 43]), expected)


def test_a_rank_for_a_linear_that_is_none_is_our_bug(toy_model: Path) -> None:
    with pytest.raises(ValueError, match="qkv_proj"):
        Decoder(open_checkpoint(toy_model).spec, max_context=8, ranks={"self_attn.qkv_proj": 2})
