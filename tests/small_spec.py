"""Dimensions of a decoder that tests make of names and shapes, or of random weights, without a checkpoint."""

from __future__ import annotations

from bedplate.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    hidden_dim=96,
    vocab_size=40,
    max_positions=64,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4, scaling=None),
    tied_head=False,
    attention_bias=True,
    mlp_bias=False,
)
