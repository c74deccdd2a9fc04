"""What `rope_parameters` may hold: sections of every type that transformers has, for heads of 32 rows."""

from __future__ import annotations

from typing import Any


def longrope(pairs: int, original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 10 for i in range(pairs)],
        "long_factor": [2.0 + i for i in range(pairs)],
        "original_max_position_embeddings": original,
    }


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default"}
LONGROPE = longrope(16, 48)
# With every parameter that changes something.
TYPES: dict[str, list[dict[str, Any]]] = {
    "default": [DEFAULT],
    "linear": [{"rope_type": "linear", "factor": 3.0}],
    "dynamic": [{"rope_type": "dynamic", "factor": 2.7}],
    "llama3": [LLAMA3, {**LLAMA3, "original_max_position_embeddings": None}],
    "yarn": [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
        {"rope_type": "yarn", "factor": 0.5},
    ],
    "longrope": [
        LONGROPE,
        {**LONGROPE, "factor": 8.0},
        {**LONGROPE, "attention_factor": 1.3},
        {**LONGROPE, "original_max_position_embeddings": 512},
    ],
    "proportional": [
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 2.0},
        {"rope_type": "proportional"},
    ],
}
