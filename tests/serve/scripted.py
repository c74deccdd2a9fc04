"""A model that always says the same, so that checks of form do not hang on chance, and with room for tools."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from toy import save_toy_tokenizer, toy_config
from transformers import LlamaForCausalLM

ANSWER = " quick brown fox"


def save_scripted_model(folder: Path) -> None:
    """A model whose next token hangs on the last one alone, because attention and MLPs add nothing.

    It answers a conversation with `ANSWER`. Where a grammar allows no token of that, it writes a quote, or it ends.
    """
    config = toy_config(tie_word_embeddings=False, max_position_embeddings=2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    folder.mkdir()
    save_toy_tokenizer(folder, config.vocab_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = tokenizer.encode("<|im_start|>assistant\n").ids[-1]
    (quote,) = tokenizer.encode('"').ids
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = torch.randn(config.vocab_size, config.hidden_size)
        states[:, 0] = 2  # what all have in common
        states *= (
            config.hidden_size / states.square().sum(dim=1, keepdim=True)
        ).sqrt()  # norms change nothing
        model.model.embed_tokens.weight.copy_(states)
        head = model.lm_head.weight
        head.zero_()
        head[quote, 0], head[config.eos_token_id, 0] = 10, 5
        for before, after in pairwise([begin, *tokenizer.encode(ANSWER).ids, config.eos_token_id]):
            head[after] += states[before] / 2
    model.save_pretrained(folder)
