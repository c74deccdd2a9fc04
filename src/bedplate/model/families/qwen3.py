"""Qwen 3, dense: norms of each head of q and k."""

from __future__ import annotations

from dataclasses import replace

from bedplate.model.families.common import Family
from bedplate.model.families.qwen2 import QWEN2, read_windowed
from bedplate.model.fields import Fields
from bedplate.spec import ModelSpec


def _read(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias")
    return replace(read_windowed(config, QWEN3), qk_norm="head", qkv_bias=bias, output_bias=bias)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    read=_read,
)
