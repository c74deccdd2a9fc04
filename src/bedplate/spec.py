"""What a decoder is, as data: its sizes, what its layers compute, and the shapes that follow from them.

Whatever computes a model follows this description: the decoder for export, the float reference, quantization and the
native runtime. None of them knows a family's name. A family (`model/families/`) turns a config into it.

Parameters have the same names in every model: `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, and in
`layers.N.`: the linears of `linear_shapes`, `self_attn.{q,k}_norm.weight`, and those of `norms`.

What a family stores in another way is changed when its tensors are read: fused linears are split, norm weights of
1 + w are summed, and the rows of q and k stand so that row i of a head turns with row i + head_dim / 2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

# attention_norm and mlp_norm: of what attention and the MLP read. attention_output_norm and mlp_output_norm: of what
# they give, before it is added to the residual stream.
NormPlace = Literal["attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm"]
NORMS: tuple[NormPlace, ...] = ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """The frequencies of sequences that are longer than `above`. They count for all positions of such a sequence."""

    frequencies: tuple[float, ...]
    above: int


@dataclass(frozen=True, kw_only=True)
class RopeTable:
    """A rotary embedding: cos(position · frequency) · scale, and sin likewise.

    frequencies: of the pairs (i, i + head_dim / 2) of a head, [head_dim / 2]. A pair of frequency 0 stays as it is:
        the scale is not for it.
    """

    frequencies: tuple[float, ...]
    scale: float
    long: LongRope | None


@dataclass(frozen=True, kw_only=True)
class RotaryRows:
    """Which rows of a head of q and k turn together in the model's own files, and so in its adapters.

    width: how many rows turn, from the first on.
    interleaved: True: rows 2i and 2i + 1. False: rows i and i + width / 2.
    """

    width: int
    interleaved: bool


@dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """Queries at a position are multiplied by 1 + beta · log(1 + floor(position / original_positions))."""

    beta: float
    original_positions: int


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What layers of a model may differ in.

    rope: the number of its table in `ModelSpec.ropes`. None: q and k do not turn.
    window: how many keys a query sees, its own included. None: all before it, and its own.
    """

    rope: int | None
    window: int | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder. Sizes count elements. A layer computes, with x the residual stream:

        x = x + residual_scale · attention_output_norm(attention(attention_norm(x)))
        x = x + residual_scale · mlp_output_norm(mlp(mlp_norm(x)))

    model_type, architecture: as transformers names the model.
    rotary: the rows of q and k in the model's own files.
    norms: those that a layer has. One that it has not changes nothing.
    parallel: the MLP reads what attention reads, and both are added at once.
    norm: "rms", or "layer": with the mean taken away. norm_bias: all norms but those of q and k add one.
    qk_norm: q and k are divided by their root mean square before they turn: "head" by head, or each as a "whole".
    qkv_bias, output_bias, mlp_bias: which linears add one: q, k and v; o; those of the MLP.
    gated: down(activation(gate(x)) · up(x)). Otherwise down(activation(up(x))).
    attention_scale: of the scores. score_cap, logit_cap: y becomes cap · tanh(y / cap).
    logit_scale: of the head's outputs, before the cap.
    """

    model_type: str
    architecture: str
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    rotary: RotaryRows
    ropes: tuple[RopeTable, ...]
    layers: tuple[LayerSpec, ...]
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_bias: bool
    norms: tuple[NormPlace, ...]
    parallel: bool
    qk_norm: Literal["head", "whole"] | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: Literal["silu", "gelu_tanh", "relu2"]
    gated: bool
    embedding_scale: float
    residual_scale: float
    attention_scale: float
    logit_scale: float
    score_cap: float | None
    logit_cap: float | None
    query_growth: QueryGrowth | None

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def used_ropes(self) -> tuple[RopeTable, ...]:
        """None, if no layer turns."""
        return self.ropes if any(layer.rope is not None for layer in self.layers) else ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def growing(spec: ModelSpec, max_context: int) -> QueryGrowth | None:
    """The growth of queries, if texts of this context have any. Within the original positions the factor is 1."""
    growth = spec.query_growth
    return growth if growth is not None and max_context > growth.original_positions else None


def narrow_window(layer: LayerSpec, max_context: int) -> int | None:
    """The window of a layer, if a text of this context reaches beyond it."""
    return layer.window if layer.window is not None and layer.window < max_context else None


def narrow_windows(spec: ModelSpec, max_context: int) -> list[int]:
    """All such windows of a model."""
    windows = {narrow_window(layer, max_context) for layer in spec.layers}
    return sorted(window for window in windows if window is not None)


def mask_windows(spec: ModelSpec, max_context: int) -> tuple[int | None, ...]:
    """The windows that programs of fixed shapes have masks for, in order. None: of layers that see all before."""
    return tuple(dict.fromkeys(narrow_window(layer, max_context) for layer in spec.layers))


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each linear of a layer, by its name in the layer, in the order of the model."""
    q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    gate = {"mlp.gate_proj": (spec.hidden_dim, spec.dim)} if spec.gated else {}
    return {
        "self_attn.q_proj": (q_width, spec.dim),
        "self_attn.k_proj": (kv_width, spec.dim),
        "self_attn.v_proj": (kv_width, spec.dim),
        "self_attn.o_proj": (spec.dim, q_width),
        **gate,
        "mlp.up_proj": (spec.hidden_dim, spec.dim),
        "mlp.down_proj": (spec.dim, spec.hidden_dim),
    }


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its name, layer by layer. A tied head is no parameter of its own."""
    layer: dict[str, tuple[int, ...]] = {}
    with_bias = {
        "self_attn.q_proj": spec.qkv_bias,
        "self_attn.k_proj": spec.qkv_bias,
        "self_attn.v_proj": spec.qkv_bias,
        "self_attn.o_proj": spec.output_bias,
    }
    for name, (rows, columns) in linear_shapes(spec).items():
        layer[f"{name}.weight"] = (rows, columns)
        if with_bias.get(name, spec.mlp_bias):
            layer[f"{name}.bias"] = (rows,)
    for part, shape in qk_norm_shapes(spec).items():
        layer[f"self_attn.{part}_norm.weight"] = shape
    for name in spec.norms:
        layer |= _norm(name, spec)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, spec.dim)}
    for index in range(spec.n_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes |= _norm("norm", spec)
    return shapes if spec.tied_head else {**shapes, "lm_head.weight": (spec.vocab_size, spec.dim)}


def qk_norm_shapes(spec: ModelSpec) -> dict[str, tuple[int]]:
    """Shapes of the norms of `q` and `k`, if the model has them."""
    if spec.qk_norm is None:
        return {}
    heads = {"q": spec.n_heads, "k": spec.n_kv_heads}
    return {
        part: (spec.head_dim * (count if spec.qk_norm == "whole" else 1),) for part, count in heads.items()
    }


def _norm(name: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (spec.dim,) for leaf in ("weight", "bias")[: 1 + spec.norm_bias]}


def correction_places(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The place of each correction in a layer → the linears that share it, which have one input (see Correction)."""
    inputs = ("mlp.gate_proj", "mlp.up_proj") if spec.gated else ("mlp.up_proj",)
    return {
        "self_attn.input_correction": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.output_correction": ("self_attn.o_proj",),
        "mlp.input_correction": inputs,
        "mlp.output_correction": ("mlp.down_proj",),
    }


def corrected_together(spec: ModelSpec, corrections: Collection[str]) -> dict[str, list[str]]:
    """Module path of each correction of a model → those of the linears that it corrects, which have one input.

    corrections: the linears that have one, by their names in a layer.
    """
    together = {}
    for layer in range(spec.n_layers):
        for place, names in correction_places(spec).items():
            if paths := [f"layers.{layer}.{name}" for name in names if name in corrections]:
                together[f"layers.{layer}.{place}"] = paths
    return together
