"""Train a small model of some millions of parameters on a text: weights that never had few bits.

    python benchmarks/train_small.py OUT [--family FAMILY] [--text FILE] [--steps N]

Takes minutes on one core. Without --text, the text is the reference of Python that comes with Python. OUT becomes a
Hugging Face folder; OUT/heldout.txt is the last fifth of the text, which was not trained on. Seeded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH, BATCH = 1024, 512, 4
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
# What makes each of them its family: see docs/families.md.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 64, "layer_types": KINDS, "query_pre_attn_scalar": 64},
    # The factor of logits that leaves as much of them, at this width, as 1/16 does at that of Command R.
    "cohere2": {"sliding_window": 64, "layer_types": KINDS, "logit_scale": 0.35},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    text = options.text.read_text("utf-8") if options.text else reference_of_python()
    cut = text.index("\n", len(text) * 4 // 5)
    tokenizer = train_tokenizer(text[:cut])
    torch.manual_seed(0)
    config = AutoConfig.for_model(options.family, **{**SIZES, **FAMILIES[options.family]})
    of_config: Any = AutoModelForCausalLM.from_config
    model = of_config(config)
    tokens = torch.tensor(tokenizer.encode(text[:cut]).ids)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens", file=sys.stderr)
    train(model, tokens, options.steps)
    model.save_pretrained(options.out)
    saved: Any = PreTrainedTokenizerFast
    saved(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(options.out)
    (options.out / "heldout.txt").write_text(text[cut:].strip() + "\n")


def reference_of_python() -> str:
    """Each paragraph once: some topics repeat others."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


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


def train(model: Any, tokens: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[at : at + LENGTH] for at in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):  # half the time; the weights themselves are float32
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {step}: {loss.item():.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
