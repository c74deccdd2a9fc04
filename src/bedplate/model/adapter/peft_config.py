"""`adapter_config.json` of PEFT → what each field means for what the adapter computes.

No field is ignored unless it cannot change what the adapter computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.types import AGAIN

CONFIG = "adapter_config.json"

# Fields that say where an adapter comes from or how it was trained, but not what it computes.
_NO_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",  # the tensors themselves say what is adapted
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
_USED = ("peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights", "bias")
# What each field must not say, in the words that a user knows it by.
_NAMES = {
    "use_dora": "DoRA",
    "use_rslora": "rank-stabilized LoRA (rsLoRA)",
    "use_qalora": "QALoRA",
    "modules_to_save": "modules trained in full beside the adapter",
    "rank_pattern": "ranks of their own for some modules",
    "alpha_pattern": "alphas of their own for some modules",
    "layers_to_transform": "adapting only some layers",
    "layer_replication": "layers used twice",
    "trainable_token_indices": "trained token embeddings",
    "lora_bias": "a bias beside B",
    "fan_in_fan_out": "transposed base weights",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapting bare parameters",
}
# Initializations that leave the base model's weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change
# them, and then A and B alone do not describe the fine-tune.
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_PLAIN = "bedplate takes plain LoRA and ignores no field: merge it into the base, or train without it"


def read_config(data: bytes, path: Path) -> dict[str, Any]:
    """The fields. Raises AdapterError or UnsupportedError."""
    try:
        config = json.loads(data)
    except ValueError as error:
        raise AdapterError(f"is no JSON: {error}", where=path, hint=AGAIN) from None
    if not isinstance(config, dict):
        raise AdapterError("is not a JSON object", where=path, hint=AGAIN)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"PEFT type {config.get('peft_type')!r} is not supported", where=path, hint="supported: LORA"
        )
    for field, value in sorted(config.items()):
        if field in _USED or field in _NO_EFFECT or value is False or value in (None, {}, [], ""):
            continue
        meaning = f" ({_NAMES[field]})" if field in _NAMES else ""
        raise UnsupportedError(
            f"{field} = {_short(value)}{meaning} is not supported",
            where=path,
            hint=_PLAIN,
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"bias = {config['bias']!r} (trained biases) is not supported", where=path, hint=_PLAIN
        )
    start = config.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        raise UnsupportedError(
            f"init_lora_weights = {start!r} is not supported: it may have changed the base model's weights",
            where=path,
            hint="convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    return config


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def rank_and_alpha(config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"r must be a positive integer, got {rank!r}", where=where, hint=AGAIN)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha must be a number, got {alpha!r}", where=where, hint=AGAIN)
    return rank, float(alpha)
