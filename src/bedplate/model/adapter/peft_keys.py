"""Names of tensors in a PEFT file → what each belongs to, or what it means that is not taken."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What programs put in front of or between the names of modules: torch.compile, DDP, FSDP, activation checkpoints.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What stands before `layers` or `lm_head`; a language model inside a multimodal one has one more.
_OUTER = re.compile(r"^(?:base_model\.)?(?:model\.|language_model\.)*")
_MODULE = r"(?:layers\.(?P<layer>[0-9]{1,6})\.)?(?P<module>[^.]+(?:\.[^.]+)*)"
# A state dict that was saved by hand has the adapter's name in it (`lora_A.default.weight`).
_HALF = re.compile(rf"^{_MODULE}\.lora_(?P<half>[AB])(?:\.[^.]+)?\.(?P<leaf>weight|bias)$")
_OF_EMBEDDING = re.compile(r"^(?P<module>embed_tokens)\.lora_embedding_(?P<half>[AB])(?:\.[^.]+)?$")
_MAGNITUDE = re.compile(rf"^{_MODULE}\.lora_magnitude_vector(?:(?:\.[^.]+)?\.weight)?$")
_ROWS = re.compile(r"^(?P<module>embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_VALUE = re.compile(
    r"^(?P<module>embed_tokens|lm_head|norm|layers\.[0-9]{1,6}\.[^.]+(?:\.[^.]+)*?)"
    r"(?P<inside>\.base_layer|\.token_adapter\.base_layer)?\.(?P<leaf>weight|bias)$"
)
# PEFT saves all that is in the embedding and the head of a model whose vocabulary grew.
_COPY = re.compile(r"^(?P<module>embed_tokens|lm_head)\.(?P<inside>modules_to_save|original_module)\.weight$")
# Parts of an adapter that only training needs.
_TRAINING_ONLY = re.compile(r"\.(?:lora_velora_embed|lora_monteclora_sampler)(?:\.|$)")

# What else may be in a file; the first that matches counts.
_MEANINGS = (
    (re.compile(r"lora_magnitude_vector"), "DoRA"),
    (re.compile(r"lora_diag"), "KaSA, which changes the base model's weights"),
    (re.compile(r"lora_arrow"), "Arrow, which routes between several adapters"),
    (re.compile(r"lora_E\b|ranknum"), "AdaLoRA"),
    (re.compile(r"trainable_tokens"), "trained token embeddings (trainable_token_indices)"),
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
    (
        re.compile(r"^layers\.\d+\..*\.weight$"),
        "weights of the base model, trained in full (modules_to_save)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Half:
    """A part of what is done to a linear of a layer, or to one of no layer: `A`, `B`, `magnitude` or `bias`."""

    layer: int | None
    linear: str
    half: str


@dataclass(frozen=True, kw_only=True)
class Value:
    """A parameter of the base model, as the adapter has it.

    name: in the model's files. inside: PEFT's modules that it is in (`base_layer`).
    """

    name: str
    inside: str


@dataclass(frozen=True, kw_only=True)
class Copy:
    """What PEFT saves beside the embedding or the head that is trained in full.

    inside: `modules_to_save`, once more what is trained; or `original_module`, the base model's.
    """

    module: str
    inside: str


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of tokens in place of those of `embed_tokens` or `lm_head`."""

    module: str


@dataclass(frozen=True, kw_only=True)
class NotTaken:
    """Something that bedplate does not take. weight: of several, the lightest says most about the adapter."""

    meaning: str
    weight: int


Key = Half | Value | Copy | Rows | NotTaken | None


def parse_key(name: str) -> Key:
    """What a tensor is, by its name. None: inference does not need it."""
    bare = _bare(name)
    if _TRAINING_ONLY.search(bare):
        return None
    for pattern in (_HALF, _OF_EMBEDDING, _MAGNITUDE):
        if (found := pattern.match(bare)) and (half := _half(found)):
            return half
    if found := _ROWS.match(bare):
        return Rows(module=found["module"])
    if found := _COPY.match(bare):
        return Copy(module=found["module"], inside=found["inside"])
    found = _VALUE.match(bare)
    if found and "base_layer" not in found["module"]:
        inside = (found["inside"] or "").removeprefix(".")
        return Value(name=f"{found['module']}.{found['leaf']}", inside=inside)
    return meaning_of(name)


def _half(found: re.Match[str]) -> Half | None:
    parts = found.groupdict()
    layer, module, half = parts.get("layer"), found["module"], parts.get("half", "magnitude")
    if parts.get("leaf") == "bias":
        half = {"A": "", "B": "bias"}[half]
    if layer is None:
        # The embedding's halves have other names, but its magnitudes have not.
        of_embedding = module == "embed_tokens" and parts.get("leaf") is None
        if module != "lm_head" and not of_embedding:
            return None
    if not half or "base_layer" in module:
        return None
    return Half(layer=None if layer is None else int(layer), linear=module, half=half)


def meaning_of(name: str) -> NotTaken:
    """What a tensor is that is not taken, in the words that a user knows it by."""
    bare = _bare(name)
    for weight, (pattern, meaning) in enumerate(_MEANINGS):
        if pattern.search(bare):
            return NotTaken(meaning=meaning, weight=weight)
    return NotTaken(meaning="something that bedplate does not know", weight=len(_MEANINGS))


def _bare(name: str) -> str:
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _OUTER.sub("", bare)
