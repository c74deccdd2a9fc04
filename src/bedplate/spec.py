"""What a decoder is, as data: its dimensions, its rotary embedding, and the shapes that follow from them."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. `scaling` is None for type `default`, or the `llama3` parameters."""

    theta: float
    scaling: Llama3Scaling | None


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """`rope_type: llama3` (as in Llama 3.1): frequencies are stretched by `factor`, the high ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(rope: RopeSpec, head_dim: int) -> list[float]:
    """The angle that each pair of a head turns by from one position to the next: [head_dim / 2], exact in float32.

    RoFormer's theta^(-2i / head_dim); with Llama 3.1's scaling, long wavelengths are stretched by `factor`, short ones
    are kept, and those between are blended.
    """
    frequencies = [1.0 / _float32(rope.theta ** _float32(i / head_dim)) for i in range(0, head_dim, 2)]
    if rope.scaling is not None:
        frequencies = [_stretched(frequency, rope.scaling) for frequency in frequencies]
    return [_float32(frequency) for frequency in frequencies]


def _stretched(frequency: float, scaling: Llama3Scaling) -> float:
    wavelength = 2 * math.pi / frequency
    original = scaling.original_max_position_embeddings
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


_FLOAT32 = struct.Struct("f")


def _float32(value: float) -> float:
    try:
        rounded: float = _FLOAT32.unpack(_FLOAT32.pack(float(value)))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions of a decoder of the Llama family. Sizes count elements."""

    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: RopeSpec
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each linear of a layer, by its name in the layer, in the order of the model."""
    q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    return {
        "self_attn.q_proj": (q_width, spec.dim),
        "self_attn.k_proj": (kv_width, spec.dim),
        "self_attn.v_proj": (kv_width, spec.dim),
        "self_attn.o_proj": (spec.dim, q_width),
        "mlp.gate_proj": (spec.hidden_dim, spec.dim),
        "mlp.up_proj": (spec.hidden_dim, spec.dim),
        "mlp.down_proj": (spec.dim, spec.hidden_dim),
    }


# The linears of a layer that have one input, by the place of the correction that they share (see Correction).
CORRECTED_TOGETHER = {
    "self_attn.input_correction": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.output_correction": ("self_attn.o_proj",),
    "mlp.input_correction": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.output_correction": ("mlp.down_proj",),
}


def corrected_together(n_layers: int, corrections: Collection[str]) -> dict[str, list[str]]:
    """Module path of each correction of a model → those of the linears that it corrects, which have one input.

    corrections: the linears that have one, by their names in a layer.
    """
    together = {}
    for layer in range(n_layers):
        for place, names in CORRECTED_TOGETHER.items():
            if paths := [f"layers.{layer}.{name}" for name in names if name in corrections]:
                together[f"layers.{layer}.{place}"] = paths
    return together
