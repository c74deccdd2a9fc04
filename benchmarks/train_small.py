"""Train a small Llama of some millions of parameters on a text: weights that never had four bits.

    python benchmarks/train_small.py TEXT OUT [--steps N]

Takes minutes on two cores. OUT becomes a Hugging Face folder; OUT/heldout.txt is the last fifth of TEXT, which was not
trained on. Seeded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH = 1024, 192, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    cut = text.index("\n", len(text) * 4 // 5)
    tokenizer = train_tokenizer(text[:cut])
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=768,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(tokenizer.encode(text[:cut]).ids)
    train(model, tokens, options.steps)
    model.save_pretrained(options.out)
    saved: Any = PreTrainedTokenizerFast
    saved(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(options.out)
    (options.out / "heldout.txt").write_text(text[cut:].strip() + "\n")


def train_tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: {loss.item():.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
