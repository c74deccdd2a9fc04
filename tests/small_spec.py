"""Descriptions of decoders that tests make of names and shapes, or of random weights, without a checkpoint."""

from __future__ import annotations

from bedplate.spec import LayerSpec, ModelSpec, RopeTable, RotaryRows, linear_shapes


def table(theta: float, head_dim: int) -> RopeTable:
    """RoFormer's, in float64."""
    frequencies = tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))
    return RopeTable(frequencies=frequencies, scale=1.0, long=None)


SPEC = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    dim=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    hidden_dim=96,
    vocab_size=40,
    max_positions=64,
    tied_head=False,
    rotary=RotaryRows(width=32, interleaved=False),
    ropes=(table(1e4, 32),),
    layers=(LayerSpec(rope=0, window=None),) * 3,
    norm="rms",
    norm_eps=1e-5,
    norm_bias=False,
    norms=("attention_norm", "mlp_norm"),
    parallel=False,
    qk_norm=None,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=False,
    activation="silu",
    gated=True,
    embedding_scale=1.0,
    residual_scale=1.0,
    attention_scale=32**-0.5,
    logit_scale=1.0,
    score_cap=None,
    logit_cap=None,
    query_growth=None,
)
LINEARS = tuple(linear_shapes(SPEC))
