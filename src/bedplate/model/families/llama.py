"""Llama: the fields of its config, as transformers' LlamaConfig and LlamaForCausalLM read them."""

from __future__ import annotations

from typing import Any

from bedplate.errors import CheckpointError, UnsupportedError
from bedplate.model.fields import Fields
from bedplate.model.rope_config import MOST_POSITIONS, rope_spec
from bedplate.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"

_NEVER = "use a model without this field: bedplate never ignores what changes the result"
_OTHER_MODEL = (
    "the weights may be those of another model: remove the field if transformers gives right answers"
)
# Fields with which transformers computes something else, or that say that the weights mean something else: the values
# with which they change nothing, and what to do about all others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    # transformers has two names for one function.
    "hidden_act": (("silu", "swish", None), _NEVER),
    "is_causal": ((None, True), _NEVER),
    "per_layer_config": ((None, {}), _NEVER),
    "layer_types": ((None,), _NEVER),
    "fusion_config": ((None,), _NEVER),
    "quantization_config": ((None,), "give the checkpoint before it was quantized"),
    "sliding_window": ((None,), _OTHER_MODEL),
    "rope_interleaved": ((None, False), _OTHER_MODEL),
}


def llama_spec(config: Fields) -> ModelSpec:
    """Raises UnsupportedError or CheckpointError, naming the field."""
    for name, (allowed, hint) in _ONLY.items():
        config.only(name, *allowed, hint=hint)
    dim, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", default=n_heads)
    _divides(config, "hidden_size", dim, "num_attention_heads", n_heads)
    _divides(config, "num_attention_heads", n_heads, "num_key_value_heads", n_kv_heads)
    head_dim = config.count("head_dim", default=dim // n_heads)
    if head_dim % 2:
        raise UnsupportedError(
            f"head_dim {head_dim} is odd, but RoPE needs an even number",
            where=config.where,
            hint="use another model",
        )
    max_positions = config.count("max_position_embeddings", default=2048, most=MOST_POSITIONS)
    return ModelSpec(
        architecture=ARCHITECTURE,
        dim=dim,
        n_layers=config.count("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=config.count("intermediate_size"),
        vocab_size=config.count("vocab_size"),
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        rope=rope_spec(config, max_positions=max_positions),
        tied_head=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


def _divides(config: Fields, whole: str, size: int, part: str, count: int) -> None:
    if size % count:
        raise CheckpointError(
            f"{whole} {size} is not a multiple of {part} {count}",
            where=config.where,
            hint="correct these fields, or download the file again",
        )
