"""llama.cpp's names of what a layer has, in ours. Needs no torch."""

LAYER_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NORMS = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "attention_norm",
    "post_attention_norm": "attention_output_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_output_norm",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
# Tensors that no parameter is: what the frequencies of the rotary embedding are divided by.
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
