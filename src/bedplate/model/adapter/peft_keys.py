"""Names of tensors in a PEFT file → the linear that each belongs to, or what it means that is not taken."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What programs put in front of or between the names of modules: torch.compile, DDP, FSDP, activation checkpoints.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What stands before `layers` or `lm_head`; a language model inside a multimodal one has one more.
_OUTER = re.compile(r"^(?:base_model\.)?(?:model\.|language_model\.)*")
# A state dict that was saved by hand has the adapter's name in it (`lora_A.default.weight`).
_HALF = re.compile(r"^layers\.([0-9]{1,6})\.([^.]+(?:\.[^.]+)*)\.lora_([AB])(?:\.[^.]+)?\.weight$")
# Parts of an adapter that only training needs.
_TRAINING_ONLY = re.compile(r"\.(?:lora_velora_embed|lora_monteclora_sampler)(?:\.|$)")

# What else may be in a file; the first that matches counts.
_MEANINGS = (
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"lora_diag"), "KaSA, which changes the base model's weights"),
    (re.compile(r"lora_arrow"), "Arrow, which routes between several adapters"),
    (re.compile(r"lora_E\b|ranknum"), "AdaLoRA"),
    (re.compile(r"trainable_tokens"), "trained token embeddings"),
    (re.compile(r"\.lora_B(?:\.[^.]+)?\.bias$"), "a trained bias beside B (lora_bias)"),
    (re.compile(r"lora_embedding_[AB]|embed_tokens\.lora_"), "a LoRA on the embedding table"),
    (re.compile(r"lm_head\.lora_"), "a LoRA on the head"),
    (re.compile(r"embed_tokens|\bwte\b"), "an embedding table of its own (trained, or grown by new tokens)"),
    (re.compile(r"lm_head"), "a head of its own (trained, or grown by new tokens)"),
    (re.compile(r"^(?:score|classifier|v_head|value_head|qa_outputs)\."), "a head of another task"),
    (re.compile(r"(?:^|[._])(?:layer)?norm\d*\."), "trained norms"),
    (re.compile(r"\.bias$"), "trained biases"),
    (re.compile(r"base_layer\.lora_"), "several adapted parameters in one module"),
    (re.compile(r"experts?\."), "a LoRA on experts"),
    (re.compile(r"\.lora_[AB]\b"), "a LoRA on a module that bedplate does not know"),
    (re.compile(r"^layers\.\d+\..*\.weight$"), "weights of the base model, trained in full"),
)


@dataclass(frozen=True, kw_only=True)
class Half:
    """A or B (`half`) of a linear of a layer."""

    layer: int
    linear: str
    half: str


@dataclass(frozen=True, kw_only=True)
class NotTaken:
    """Something that bedplate does not take. weight: of several, the lightest says most about the adapter."""

    meaning: str
    weight: int


def parse_key(name: str) -> Half | NotTaken | None:
    """What a tensor is, by its name. None: inference does not need it."""
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    bare = _OUTER.sub("", bare)
    if _TRAINING_ONLY.search(bare):
        return None
    found = _HALF.match(bare)
    if found and "base_layer" not in found[2]:
        return Half(layer=int(found[1]), linear=found[2], half=found[3])
    for weight, (pattern, meaning) in enumerate(_MEANINGS):
        if pattern.search(bare):
            return NotTaken(meaning=meaning, weight=weight)
    return NotTaken(meaning="something that bedplate does not know", weight=len(_MEANINGS))
