"""A model that always says the same, so that checks of form do not hang on chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from toy import save_toy_tokenizer, toy_config
from transformers import LlamaForCausalLM

ANSWER = " quick brown fox"


def save_scripted_model(folder: Path) -> None:
    """A model whose next token hangs on the last one alone: attention and MLPs add nothing.

    After a conversation it says `ANSWER`, and ends. A string of JSON it closes as soon as it would end.
    """
    config = toy_config(tie_word_embeddings=False, max_position_embeddings=2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    save_toy_tokenizer(folder, config.vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    answer = tokenizer.encode(ANSWER).ids
    (quote,) = tokenizer.encode('"').ids
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.nn.functional.normalize(torch.randn(embedding.shape), dim=1) * 8)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        begin = tokenizer.encode("<|im_start|>assistant\n").ids[-1]
        _follow(model, [begin, *answer, config.eos_token_id])
    model.save_pretrained(folder)


def _follow(model: LlamaForCausalLM, tokens: Sequence[int]) -> None:
    """Each of the tokens follows the one before."""
    states = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1) * 8
    for before, after in zip(tokens, tokens[1:], strict=False):
        model.lm_head.weight[after] += states[before]
