"""A toy whose adapters have three tokens more than it has, and a tokenizer for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from families import make_toy, save_toy, save_trained, with_peft
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toy import save_toy_tokenizer
from transformers import AutoTokenizer

import bedplate

VOCABULARY, GROWN = 310, 313
TEXT = "the quick <call>brown fox</call> jumps<end>"


class Toy:
    """A model of a family, and bundles of it in float and in 8 bits."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = folder / "model"
        save_toy(self.model, make_toy(family, vocab_size=VOCABULARY))
        save_toy_tokenizer(self.model, VOCABULARY)
        assert len(AutoTokenizer.from_pretrained(self.model)) == VOCABULARY, "further tokens come after"
        self.exact, self.eight = (
            bedplate.build(self.model, folder / f"{name}.bundle", programs=False, quantize=name)
            for name in ("none", "8da8w")
        )
        self.tied = bool(self.exact.manifest.model["tied_head"])

    def save(self, folder: Path, *, tokens: tuple[str, str] = ("<call>", "</call>"), **fields: Any) -> Path:
        """A trained adapter with two further tokens and the special token `<end>`: 310, 311 and 312."""
        fields = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM", **fields}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_trained(folder, self.model, LoraConfig(**fields), tokens=GROWN)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_tokens(list(tokens))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        tokenizer.save_pretrained(folder)
        return folder

    def peft(self, adapter: Path, ids: list[int]) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return with_peft(self.model, adapter, ids, vocabulary=GROWN)


def edit(adapter: Path, change: Any) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    return adapter


def likes_further_tokens(tensors: dict[str, torch.Tensor]) -> None:
    """The head gives its largest logit to 310 or to 311, whatever the text; of a model that is not tied."""
    for name in [name for name in tensors if name.endswith("lm_head.weight")]:
        tensors[name] = torch.zeros_like(tensors[name])
        tensors[name][310], tensors[name][311] = 0.1, -0.1
