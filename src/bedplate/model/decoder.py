"""The decoder, written so that XNNPACK takes everything between two attention operators as one delegate.

Shape suffixes: B batch (1), S positions of this step, D dim, H heads, K key/value heads, N head_dim, V vocabulary,
C max_context.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bedplate.model.lora import LoRALinear
from bedplate.spec import ModelSpec, RopeSpec, rope_frequencies

# The linears of a layer that an adapter can target, by their Hugging Face names.
LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight.

    mean(x²) + eps is a linear with one row of 1/D and eps as its bias: the partitioner refuses `mean`.
    """

    mean_row: Tensor
    eps: Tensor

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("mean_row", torch.full((1, dim), 1.0 / dim), persistent=False)
        self.register_buffer("eps", torch.full((1,), eps), persistent=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        mean_BS1 = F.linear(x_BSD * x_BSD, self.mean_row, self.eps)
        return x_BSD * torch.rsqrt(mean_BS1) * self.weight


class Rope(nn.Module):
    """Rotary position embedding with cos and sin from a table and rotate-half as a linear.

    rotate_half(x) = [-x₂, x₁] is x Rᵀ with R of 0 and ±1: exact, and, unlike slices, inside the delegate.
    """

    cos: Tensor
    sin: Tensor
    rotation: Tensor

    def __init__(self, spec: RopeSpec, head_dim: int, max_context: int) -> None:
        super().__init__()
        cos, sin = rope_table(spec, head_dim, max_context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        half = head_dim // 2
        rotation, one = torch.zeros(head_dim, head_dim, device="cpu"), torch.eye(half, device="cpu")
        rotation[:half, half:], rotation[half:, :half] = -one, one
        self.register_buffer("rotation", rotation, persistent=False)

    def at(self, pos: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, S, 1, N] for positions pos … pos + length - 1."""
        return self.cos.narrow(1, pos, length), self.sin.narrow(1, pos, length)

    def forward(self, x_BSHN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x_BSHN * cos + F.linear(x_BSHN, self.rotation) * sin


def rope_table(spec: RopeSpec, head_dim: int, max_context: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [1, C, 1, N], as transformers computes them."""
    # Also for a model of shapes alone: for arithmetic on "meta", torch imports its compiler, which takes a second.
    inv_freq = torch.tensor(rope_frequencies(spec, head_dim), device="cpu")
    angles = torch.arange(max_context, device="cpu").float()[:, None] * inv_freq[None, :]
    angles = torch.cat((angles, angles), dim=-1).view(1, max_context, 1, head_dim)
    return angles.cos(), angles.sin()


class Correction(nn.Module):
    """What quantization took from linears of one input, given back through a narrow waist: (x Dᵀ) Bᵀ for each.

    directions: D [rank, in]; under each linear's own name its B [out, rank].
    """

    def __init__(self, in_features: int, rank: int, outputs: Mapping[str, int], device: str | None) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.directions: nn.Module = nn.Linear(in_features, rank, bias=False, device=device)
        for name, width in outputs.items():
            self.add_module(name, nn.Linear(rank, width, bias=False, device=device))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        narrow = self.directions(x)
        return {name: self.get_submodule(name)(narrow) for name in self.outputs}


def _correct(correction: Correction | None, x: Tensor) -> dict[str, Tensor]:
    return {} if correction is None else correction(x)


def _plus(y: Tensor, corrected: Mapping[str, Tensor], name: str) -> Tensor:
    return y + corrected[name] if name in corrected else y


def _correction(
    corrections: Mapping[str, int], linears: Mapping[str, nn.Module], prefix: str, device: str | None
) -> Correction | None:
    """For those of the linears (of one input) that `corrections` names; None: it names none."""
    named = {name: linear for name, linear in linears.items() if f"{prefix}.{name}" in corrections}
    if not named:
        return None
    widths = {linear.in_features for linear in named.values()}
    ranks = {corrections[f"{prefix}.{name}"] for name in named}
    assert len(widths) == len(ranks) == 1, "linears of one input share their directions"
    outputs = {name: linear.out_features for name, linear in named.items()}
    return Correction(widths.pop(), ranks.pop(), outputs, device)  # type: ignore[arg-type]


class Attention(nn.Module):
    def __init__(
        self, spec: ModelSpec, ranks: Mapping[str, int], corrections: Mapping[str, int], device: str | None
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
        q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        bias = spec.attention_bias
        self.q_proj = _linear(spec.dim, q_width, bias, ranks.get("self_attn.q_proj"), device)
        self.k_proj = _linear(spec.dim, kv_width, bias, ranks.get("self_attn.k_proj"), device)
        self.v_proj = _linear(spec.dim, kv_width, bias, ranks.get("self_attn.v_proj"), device)
        self.o_proj = _linear(q_width, spec.dim, bias, ranks.get("self_attn.o_proj"), device)
        of_input = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
        self.input_correction = _correction(corrections, of_input, "self_attn", device)
        self.output_correction = _correction(corrections, {"o_proj": self.o_proj}, "self_attn", device)

    def forward(
        self, x: Tensor, k_cache: Tensor, v_cache: Tensor, rope: Rope, cos: Tensor, sin: Tensor, pos: int
    ) -> Tensor:
        q, k, v = self.project(x)
        q_BSHN = rope(q.view(1, -1, self.n_heads, self.head_dim), cos, sin)
        k_BSKN = rope(k.view(1, -1, self.n_kv_heads, self.head_dim), cos, sin)
        v_BSKN = v.view(1, -1, self.n_kv_heads, self.head_dim)
        torch.ops.llama.update_cache(k_BSKN, k_cache, pos)
        torch.ops.llama.update_cache(v_BSKN, v_cache, pos)
        y_BSHN = torch.ops.llama.custom_sdpa(q_BSHN, k_cache, v_cache, pos, None, 0.0, True)
        return self.output(y_BSHN.view(1, -1, self.n_heads * self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [1, S, heads · N] each, before RoPE."""
        given = _correct(self.input_correction, x)
        q = _plus(self.q_proj(x), given, "q_proj")
        k = _plus(self.k_proj(x), given, "k_proj")
        return q, k, _plus(self.v_proj(x), given, "v_proj")

    def output(self, y: Tensor) -> Tensor:
        """What attention adds to the residual stream, of y [1, S, H · N]."""
        return _plus(self.o_proj(y), _correct(self.output_correction, y), "o_proj")


class MLP(nn.Module):
    def __init__(
        self, spec: ModelSpec, ranks: Mapping[str, int], corrections: Mapping[str, int], device: str | None
    ) -> None:
        super().__init__()
        self.gate_proj = _linear(spec.dim, spec.hidden_dim, spec.mlp_bias, ranks.get("mlp.gate_proj"), device)
        self.up_proj = _linear(spec.dim, spec.hidden_dim, spec.mlp_bias, ranks.get("mlp.up_proj"), device)
        self.down_proj = _linear(spec.hidden_dim, spec.dim, spec.mlp_bias, ranks.get("mlp.down_proj"), device)
        of_input = {"gate_proj": self.gate_proj, "up_proj": self.up_proj}
        self.input_correction = _correction(corrections, of_input, "mlp", device)
        self.output_correction = _correction(corrections, {"down_proj": self.down_proj}, "mlp", device)

    def forward(self, x: Tensor) -> Tensor:
        given = _correct(self.input_correction, x)
        gate = _plus(self.gate_proj(x), given, "gate_proj")
        up = _plus(self.up_proj(x), given, "up_proj")
        y = F.silu(gate) * up
        return _plus(self.down_proj(y), _correct(self.output_correction, y), "down_proj")


class Layer(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        max_context: int,
        ranks: Mapping[str, int],
        corrections: Mapping[str, int],
        device: str | None,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.dim, spec.norm_eps)
        self.self_attn = Attention(spec, ranks, corrections, device)
        self.post_attention_layernorm = RMSNorm(spec.dim, spec.norm_eps)
        self.mlp = MLP(spec, ranks, corrections, device)
        cache_shape = (1, max_context, spec.n_kv_heads, spec.head_dim)
        self.register_buffer("k_cache", torch.zeros(cache_shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(cache_shape), persistent=False)

    def forward(self, x: Tensor, rope: Rope, cos: Tensor, sin: Tensor, pos: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), self.k_cache, self.v_cache, rope, cos, sin, pos)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A decoder of the Llama family with its KV cache inside.

    ranks: LoRA rank of each linear that has a branch, by its name in a layer (`mlp.up_proj`); the same in all layers.
    corrections: rank of the correction of each linear that has one, likewise; equal where linears have one input.
    device: where the linears and the embedding are made; "meta" when their values come from elsewhere anyway.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_context: int,
        ranks: Mapping[str, int] | None = None,
        corrections: Mapping[str, int] | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        ranks, corrections = ranks or {}, corrections or {}
        if unknown := sorted((set(ranks) | set(corrections)) - set(LAYER_LINEARS)):
            raise ValueError(f"no such linears: {unknown}")
        self.spec, self.max_context, self.corrections = spec, max_context, dict(corrections)
        self.embed_tokens: nn.Module = _embedding(spec.vocab_size, spec.dim, device)
        self.rope = Rope(spec.rope, spec.head_dim, max_context)
        self.layers = nn.ModuleList(
            Layer(spec, max_context, ranks, corrections, device) for _ in range(spec.n_layers)
        )
        self.norm = RMSNorm(spec.dim, spec.norm_eps)
        self.lm_head: nn.Module = _linear(spec.dim, spec.vocab_size, False, None, device)

    def forward(self, tokens: Tensor, input_pos: Tensor, last_rows: Tensor) -> Tensor:
        """Logits float32 [1, R, V] of the last R of tokens int64 [1, S] at positions input_pos … input_pos + S - 1.

        last_rows [R] counts by its length alone: R is 1 for generation, S for evaluation. A length is what the
        exporter can bound, so one lowered head serves both; the linker makes a method for each and drops the input.
        """
        register_operators()
        pos, length, rows = input_pos.item(), tokens.shape[1], last_rows.shape[0]
        torch._check(pos >= 0)  # type: ignore[no-untyped-call]
        torch._check(pos + length <= self.max_context)  # type: ignore[no-untyped-call]
        cos, sin = self.rope.at(pos, length)  # type: ignore[arg-type]
        x_BSD = self.embed_tokens(tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.rope, cos, sin, pos)
        x_BRD = x_BSD.narrow(1, length - rows, rows)
        return self.lm_head(self.norm(x_BRD))  # type: ignore[no-any-return]

    def reset_cache(self) -> None:
        for layer in self.layers:
            layer.k_cache.zero_()  # type: ignore[operator]
            layer.v_cache.zero_()  # type: ignore[operator]


@functools.cache
def register_operators() -> None:
    """Make torch know `llama::update_cache` and `llama::custom_sdpa`, which takes seconds."""
    import_module("executorch.extension.llm.custom_ops.custom_ops")


def _embedding(rows: int, columns: int, device: str | None) -> nn.Module:
    if device != "meta":
        return nn.Embedding(rows, columns, device=device)
    # Without random values: those, too, would import torch's compiler.
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns, device=device))


def _linear(
    in_features: int, out_features: int, bias: bool, rank: int | None, device: str | None
) -> nn.Module:
    if rank is None:
        return nn.Linear(in_features, out_features, bias=bias, device=device)
    return LoRALinear(in_features, out_features, rank=rank, bias=bias, device=device)
