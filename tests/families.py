"""Toys of every family, made by transformers: small, random in every parameter, and with settings that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.overrides import TorchFunctionMode
from toy import save_with_random_b
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

WINDOW, LENGTH = 5, 24  # of the toys with windows; and of the texts that are computed
FULL, SLIDING = "full_attention", "sliding_attention"
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


def _longrope(pairs: int, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 4 for i in range(pairs)],
        "long_factor": [3.0 + i for i in range(pairs)],
        "original_max_position_embeddings": original,
    }


# Fields of each family's first toy, and what its others change. The first one is also walked through, field by field.
TOYS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (
        {"head_dim": 16, "tie_word_embeddings": True},
        {
            "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
            "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
            "gelu": {"hidden_act": "gelu_pytorch_tanh"},
            "llama3": {"rope_parameters": LLAMA3},
            "linear": {"rope_parameters": _LINEAR},
            "dynamic": {"rope_parameters": _DYNAMIC},
            "yarn": {"rope_parameters": YARN},
            "longrope, short": {"rope_parameters": _longrope(8, 32)},
            "longrope, long": {"rope_parameters": _longrope(8, 16)},
            "proportional": {"rope_parameters": _PROPORTIONAL},
        },
    ),
    "smollm3": (
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": WINDOW},
        {
            "no windows": {"use_sliding_window": False},
            "every third, biases": {
                "no_rope_layers": None,
                "no_rope_layer_interval": 3,
                "attention_bias": True,
            },
            "kinds": {
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "layer_types": [SLIDING, FULL, SLIDING, FULL],
            },
        },
    ),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {
            "tied, yarn": {
                "tie_word_embeddings": True,
                "rope_parameters": YARN,
                "use_sliding_window": False,
            },
            "a window that is off": {
                "use_sliding_window": False,
                "sliding_window": WINDOW,
                "max_window_layers": 2,
            },
        },
    ),
    "qwen3": (
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {
            "biases, tied": {
                "attention_bias": True,
                "tie_word_embeddings": True,
                "use_sliding_window": False,
            },
            "kinds": {
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "layer_types": [SLIDING, FULL, SLIDING, FULL],
            },
        },
    ),
    "mistral": (
        {"sliding_window": WINDOW},
        {"no window, heads": {"sliding_window": None, "head_dim": 32}, "tied": {"tie_word_embeddings": True}},
    ),
    "ministral": (
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {
            "all slide, heads": {"layer_types": None, "head_dim": 32},
            "no windows": {"layer_types": [FULL] * 4},
        },
    ),
    "ministral3": (
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.7},
        },
        {
            "window, mscale": {
                "sliding_window": WINDOW,
                "rope_parameters": {
                    **YARN,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.3,
                },
            },
            "as the class": {"rope_parameters": None},
        },
    ),
    "gemma": (
        {"head_dim": 32},
        {"untied, biases": {"tie_word_embeddings": False, "attention_bias": True}},
    ),
    "gemma2": (
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "no caps, biases": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
                "tie_word_embeddings": False,
            },
            "kinds": {"layer_types": [FULL, FULL, SLIDING, SLIDING], "sliding_window": 9},
        },
    ),
    "gemma3_text": (
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            },
        },
        {
            "as the class": {"rope_parameters": None, "layer_types": None, "sliding_window_pattern": 2},
            "caps, biases": {
                "final_logit_softcapping": 3.0,
                "attention_bias": True,
                "tie_word_embeddings": False,
            },
            "yarn": {"rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 50.0}, FULL: YARN}},
        },
    ),
    "phi3": (
        {},
        {
            "partial": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
            "window, tied": {"sliding_window": WINDOW, "tie_word_embeddings": True},
            "longrope, short": {
                "rope_parameters": {**_longrope(6, 4096), "partial_rotary_factor": 0.75},
                "original_max_position_embeddings": 32,
            },
            "longrope, long": {
                "rope_parameters": {**_longrope(6, 4096), "partial_rotary_factor": 0.75},
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "granite": (
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.3,
        },
        {
            "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
            "none": dict.fromkeys(
                ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0
            ),
        },
    ),
    "granitemoehybrid": (
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.3,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "intermediate_size": 40,
            "layer_types": [FULL] * 4,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
        {
            "no rotation": {"position_embedding_type": None},
            "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "olmo2": ({}, {"biases, tied": {"attention_bias": True, "tie_word_embeddings": True}}),
    "olmo3": (
        {"sliding_window": WINDOW},
        {
            "yarn": {
                "layer_types": [SLIDING, FULL, FULL, SLIDING],
                "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: YARN},
            },
            "biases": {"attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "nemotron": (
        {"head_dim": 32},
        {
            "biases, all turn": {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0},
            },
            "proportional": {"rope_parameters": _PROPORTIONAL, "tie_word_embeddings": True},
        },
    ),
    "arcee": (
        {},
        {
            "biases, heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
            "yarn": {"rope_parameters": YARN},
        },
    ),
    "seed_oss": (
        {"head_dim": 32},
        {
            "other biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
            "tied": {"tie_word_embeddings": True},
        },
    ),
    "stablelm": (
        {},
        {
            "parallel, biases": {"use_parallel_residual": True, "use_qkv_bias": True},
            "half turns, tied": {
                "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                "tie_word_embeddings": True,
            },
        },
    ),
    "cohere2": (
        {"sliding_window": WINDOW, "logit_scale": 0.3, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"biases, untied": {"attention_bias": True, "tie_word_embeddings": False, "layer_types": None}},
    ),
    "glm4": (
        {"head_dim": 32},
        {
            "no biases, tied": {"attention_bias": False, "tie_word_embeddings": True},
            "all turn": {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 1.0}},
            "yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        },
    ),
    "helium": (
        {"head_dim": 16},
        {"biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    ),
    "ernie4_5": (
        {"head_dim": 32},
        {
            "biases, untied": {"use_bias": True, "tie_word_embeddings": False},
            "linear": {"rope_parameters": _LINEAR},
        },
    ),
    "exaone4": (
        {"sliding_window": WINDOW, "layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
        {
            "no windows": {"sliding_window": None, "layer_types": [FULL] * 4},
            "pattern, tied": {"layer_types": None, "sliding_window_pattern": 2, "tie_word_embeddings": True},
        },
    ),
}


def variants() -> list[tuple[str, str]]:
    """(model_type, name of a toy) of all."""
    return [(family, name) for family, (_, others) in TOYS.items() for name in ("first", *others)]


def toy_fields(family: str, variant: str = "first") -> dict[str, Any]:
    first, others = TOYS[family]
    return {**_SIZES, **first, **others.get(variant, {})}


def make_toy(family: str, variant: str = "first", **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**toy_fields(family, variant), **changes})


def save_toy(folder: Path, config: PreTrainedConfig, *, seed: int = 0, spread: float | None = None) -> Any:
    """A random model, as transformers saves it. spread: of what a linear gives, however wide the model is."""
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model, seed, spread)
    quiet(lambda: model.save_pretrained(folder))
    return model


def randomize(model: Any, seed: int, spread: float | None = None) -> None:
    """Every parameter, so that logits tell models apart."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2 if spread is None else spread / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(-0.4, 0.9)
    model.tie_weights()


class Exact(TorchFunctionMode):
    """Doubles stay doubles: transformers takes norms and softmax in float32 otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args):
                return args[0]
            kwargs = {name: value for name, value in kwargs.items() if value is not torch.float32}
        return func(*args, **kwargs)


def theirs(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [T, V] of transformers; of float64, without any rounding to float32 but that of angles."""
    with torch.no_grad(), Exact():
        return theirs_of(folder, dtype)(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def theirs_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return quiet(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def save_adapter(folder: Path, model: Path, config: LoraConfig) -> Path:
    """A random adapter, as PEFT saves it."""
    torch.manual_seed(3)
    adapted = get_peft_model(theirs_of(model), config)
    return save_with_random_b(folder, adapted, spread=0.3)


def save_trained(folder: Path, model: Path, config: LoraConfig, *, tokens: int | None = None) -> Path:
    """An adapter as PEFT saves it, with random numbers in all that it trains. tokens: as many has its vocabulary."""
    base = theirs_of(model)
    if tokens is not None:
        quiet(lambda: base.resize_token_embeddings(tokens))
    torch.manual_seed(5)
    adapted = quiet(lambda: get_peft_model(base, config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter *= torch.empty_like(parameter).uniform_(0.6, 1.5)
            elif "lora_embedding_A" in name or "lora_B" in name:
                parameter.normal_(0.0, 0.3)
            else:
                parameter += torch.empty_like(parameter).normal_(0.0, 0.2)
    quiet(lambda: adapted.save_pretrained(folder))
    return folder


def with_peft(
    folder: Path, adapter: Path, tokens: list[int], *, vocabulary: int | None = None
) -> torch.Tensor:
    """Logits [T, V] of transformers with an adapter. vocabulary: what its embedding is resized to first."""
    base = theirs_of(folder)
    if vocabulary is not None:
        quiet(lambda: base.resize_token_embeddings(vocabulary))
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def quiet(call: Any) -> Any:
    """transformers says much about configs that it does not like, and draws bars."""
    verbosity = logging.get_verbosity()
    if verbosity == logging.CRITICAL:
        return call()  # within another; to change it, each time, all loggers of the process are told
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        return call()
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
