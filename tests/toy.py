"""A toy model of the Llama family, with its tokenizer and adapters, as Hugging Face and PEFT save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import bedplate
from bedplate.names import ROW_NORMS

BuildToy = Callable[..., bedplate.Bundle]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def toy_config(**changes: Any) -> LlamaConfig:
    """A Llama of three layers with grouped-query attention; small, but with widths that groups of 32 divide."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaConfig(**{**fields, **changes})


def save_toy_model(folder: Path, config: LlamaConfig, *, seed: int = 0) -> LlamaForCausalLM:
    """A random model with its tokenizer, as Hugging Face saves them."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual start: logits then tell models apart
            parameter.normal_(0.0, 0.2) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    model.tie_weights()
    model.save_pretrained(folder)
    save_toy_tokenizer(folder, config.vocab_size)
    return model


def save_toy_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": special[0], "eos_token": special[1], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_adapter(
    folder: Path,
    model_folder: Path,
    *,
    seed: int,
    rank: int = 4,
    targets: list[str] | None = None,
    **fields: Any,
) -> Path:
    """A PEFT adapter with a random B, so that it does something."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets or ALL_LINEARS, task_type="CAUSAL_LM", **fields
    )
    return save_with_random_b(folder, get_peft_model(base, config), spread=0.1)


def save_with_random_b(folder: Path, adapted: Any, *, spread: float) -> Path:
    """An adapter that does something, as PEFT saves it."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, spread)
    adapted.save_pretrained(folder)
    return folder


def reference(model_folder: Path, adapter: Path | None = None) -> Any:
    """The transformers (and PEFT) model that everything is compared with, float32."""
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def is_in_programs(name: str) -> bool:
    """Whether a constant of a foundation is in programs that take any number of tokens. Of the others, one is in
    programs of fixed shapes, and adapters with DoRA are made from the rest.
    """
    return name != "attention_scale" and not name.endswith(ROW_NORMS)


def keys_in_programs(bundle: bedplate.Bundle) -> frozenset[str]:
    """The keys of those constants of the foundation."""
    constants = bundle.foundation_info.constants
    return frozenset(constant.key for constant in constants if is_in_programs(constant.name))
