"""The decoder, written so that XNNPACK takes everything between two attention operators as one delegate.

Shape suffixes: B batch (1), S positions of this step, D dim, H heads, K key/value heads, N head_dim, V vocabulary,
C max_context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from bedplate.model.lora import LoRALinear
from bedplate.model.masks import WindowMasks
from bedplate.model.parts import (
    LayerNorm,
    QueryFactors,
    RMSNorm,
    Rope,
    activation,
    attend,
    finished,
    scaled,
)
from bedplate.spec import (
    LayerSpec,
    ModelSpec,
    NormPlace,
    growing,
    linear_shapes,
    narrow_window,
    narrow_windows,
    qk_norm_shapes,
)


def _norm(spec: ModelSpec) -> RMSNorm:
    if spec.norm == "layer":
        return LayerNorm(spec.dim, spec.norm_eps, bias=spec.norm_bias)
    return RMSNorm(spec.dim, spec.norm_eps)


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
    """window: narrower than the context. None: a query sees all before it."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        max_context: int,
        ranks: Mapping[str, int],
        corrections: Mapping[str, int],
        device: str | None,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
        self.rope, self.cap, self.scale = layer.rope, spec.score_cap, spec.attention_scale
        self.window = narrow_window(layer, max_context)
        q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        bias = spec.qkv_bias
        self.q_proj = _linear(spec.dim, q_width, bias, ranks.get("self_attn.q_proj"), device)
        self.k_proj = _linear(spec.dim, kv_width, bias, ranks.get("self_attn.k_proj"), device)
        self.v_proj = _linear(spec.dim, kv_width, bias, ranks.get("self_attn.v_proj"), device)
        self.o_proj = _linear(q_width, spec.dim, spec.output_bias, ranks.get("self_attn.o_proj"), device)
        self.qk_norm = spec.qk_norm
        for part, shape in qk_norm_shapes(spec).items():
            self.add_module(f"{part}_norm", RMSNorm(*shape, spec.norm_eps))
        of_input = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
        self.input_correction = _correction(corrections, of_input, "self_attn", device)
        self.output_correction = _correction(corrections, {"o_proj": self.o_proj}, "self_attn", device)

    def forward(self, x: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step) -> Tensor:
        q_BSHN, k_BSKN, v_BSKN = self.heads(x, step)
        torch.ops.llama.update_cache(k_BSKN, k_cache, step.pos)
        torch.ops.llama.update_cache(v_BSKN, v_cache, step.pos)
        y_BSHN = self._attend(q_BSHN, k_cache, v_cache, step)
        return self.output(y_BSHN.view(1, -1, self.n_heads * self.head_dim))

    def heads(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, S, H, N], k and v [1, S, K, N]: what attention works on."""
        q, k, v = self.project(x)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHN = q.view(1, -1, self.n_heads, self.head_dim)
        k_BSKN = k.view(1, -1, self.n_kv_heads, self.head_dim)
        v_BSKN = v.view(1, -1, self.n_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q_BSHN, k_BSKN = self.q_norm(q_BSHN), self.k_norm(k_BSKN)
        if self.rope is not None:
            cos, sin = places.tables[self.rope]
            q_BSHN, k_BSKN = places.rope(q_BSHN, cos, sin), places.rope(k_BSKN, cos, sin)
        if places.query_factors is not None:
            q_BSHN = q_BSHN * places.query_factors
        return q_BSHN, k_BSKN, v_BSKN

    def _attend(self, q_BSHN: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step) -> Tensor:
        mask = None if self.window is None else step.masks.get(self.window)
        if self.cap is not None or (self.window is not None and mask is None):
            seen = step.pos + q_BSHN.shape[1]
            return attend(
                q_BSHN[0],
                k_cache[0, :seen],
                v_cache[0, :seen],
                first=step.pos,
                scale=self.scale,
                window=self.window,
                cap=self.cap,
            )[None]
        # The operator's own scale is left to it.
        scale = () if self.scale == self.head_dim**-0.5 else (self.scale,)
        return torch.ops.llama.custom_sdpa(  # type: ignore[no-any-return]
            q_BSHN, k_cache, v_cache, step.pos, mask, 0.0, mask is None, *scale
        )

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
        self.inner = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
        for name in self.inner:
            linear = _linear(spec.dim, spec.hidden_dim, spec.mlp_bias, ranks.get(f"mlp.{name}"), device)
            self.add_module(name, linear)
        self.down_proj = _linear(spec.hidden_dim, spec.dim, spec.mlp_bias, ranks.get("mlp.down_proj"), device)
        self.activation = activation(spec.activation)
        of_input = {name: self.get_submodule(name) for name in self.inner}
        self.input_correction = _correction(corrections, of_input, "mlp", device)
        self.output_correction = _correction(corrections, {"down_proj": self.down_proj}, "mlp", device)

    def forward(self, x: Tensor) -> Tensor:
        given = _correct(self.input_correction, x)
        first, *up = [_plus(self.get_submodule(name)(x), given, name) for name in self.inner]
        y = self.activation(first)
        if up:
            y = y * up[0]
        return _plus(self.down_proj(y), _correct(self.output_correction, y), "down_proj")


@dataclass(frozen=True, kw_only=True)
class Places:
    """What positions do to q and k: cos and sin [1, S, 1, N] of each table, and the factors of queries."""

    rope: Rope
    tables: list[tuple[Tensor, Tensor]]
    query_factors: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Step(Places):
    """What all layers need of a step. pos: of its first token. masks: of windows, [S, C]."""

    pos: int
    masks: Mapping[int, Tensor]


class Layer(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        max_context: int,
        ranks: Mapping[str, int],
        corrections: Mapping[str, int],
        device: str | None,
    ) -> None:
        super().__init__()
        self.attention_norm = _norm_at("attention_norm", spec)
        self.self_attn = Attention(spec, layer, max_context, ranks, corrections, device)
        self.attention_output_norm = _norm_at("attention_output_norm", spec)
        self.mlp_norm = _norm_at("mlp_norm", spec)
        self.mlp = MLP(spec, ranks, corrections, device)
        self.mlp_output_norm = _norm_at("mlp_output_norm", spec)
        self.parallel, self.residual_scale = spec.parallel, scaled(spec.residual_scale)
        cache_shape = (1, max_context, spec.n_kv_heads, spec.head_dim)
        self.register_buffer("k_cache", torch.zeros(cache_shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(cache_shape), persistent=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.around(x, lambda read: self.self_attn(read, self.k_cache, self.v_cache, step))

    def around(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """What the layer makes of the residual stream, with whatever computes its attention."""
        y = attention(self.attention_norm(x))
        between = x + self.residual_scale(self.attention_output_norm(y))
        # Normed again, so that a program's layers pass nothing but x beside attention.
        read = self.attention_norm(x) if self.parallel else self.mlp_norm(between)
        return between + self.residual_scale(self.mlp_output_norm(self.mlp(read)))  # type: ignore[no-any-return]


def _norm_at(place: NormPlace, spec: ModelSpec) -> nn.Module:
    return _norm(spec) if place in spec.norms else nn.Identity()


class Decoder(nn.Module):
    """The decoder of a description, with its KV cache inside.

    ranks: LoRA rank of each linear that has a branch, by its name in a layer (`mlp.up_proj`); the same in all layers.
    corrections: rank of the correction of each linear that has one, likewise; equal where linears have one input.
    max_chunk: the longest step of the stock attention operator, for a program. None: windows are computed without it.
    device: where the linears and the embedding are made; "meta" when their values come from elsewhere anyway.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_context: int,
        max_chunk: int | None = None,
        ranks: Mapping[str, int] | None = None,
        corrections: Mapping[str, int] | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        ranks, corrections = ranks or {}, corrections or {}
        if unknown := sorted((set(ranks) | set(corrections)) - set(linear_shapes(spec))):
            raise ValueError(f"no such linears: {unknown}")
        self.spec, self.max_context, self.corrections = spec, max_context, dict(corrections)
        self.embed_tokens: nn.Module = _embedding(spec.vocab_size, spec.dim, device)
        self.rope = Rope(spec.used_ropes, spec.head_dim, max_context)
        growth = growing(spec, max_context)
        self.query_factors = QueryFactors(growth, max_context) if growth else None
        windows = narrow_windows(spec, max_context) if max_chunk else []
        self.masks = WindowMasks(windows, max_context, max_chunk or 0)
        self.layers = nn.ModuleList(
            Layer(spec, layer, max_context, ranks, corrections, device) for layer in spec.layers
        )
        self.norm = _norm(spec)
        self.lm_head: nn.Module = _linear(spec.dim, spec.vocab_size, False, None, device)
        self.embedding_scale, self.finish = scaled(spec.embedding_scale), finished(spec)

    def forward(self, tokens: Tensor, input_pos: Tensor, last_rows: Tensor) -> Tensor:
        """Logits float32 [1, R, V] of the last R of tokens int64 [1, S] at positions input_pos … input_pos + S - 1.

        last_rows [R] counts by its length alone: R is 1 for generation, S for evaluation. A length is what the
        exporter can bound, so one lowered head serves both; the linker makes a method for each and drops the input.
        """
        register_operators()
        pos, length, rows = input_pos.item(), tokens.shape[1], last_rows.shape[0]
        torch._check(pos >= 0)  # type: ignore[no-untyped-call]
        torch._check(pos + length <= self.max_context)  # type: ignore[no-untyped-call]
        step = Step(
            pos=pos,  # type: ignore[arg-type]
            rope=self.rope,
            tables=self.rope.at(pos, length),  # type: ignore[arg-type]
            query_factors=self.query_factors and self.query_factors.at(pos, length),  # type: ignore[arg-type]
            masks=self.masks.at(pos, length),  # type: ignore[arg-type]
        )
        x_BSD = self.embed(tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD, step)
        return self.logits(x_BSD.narrow(1, length - rows, rows))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding_scale(self.embed_tokens(tokens))  # type: ignore[no-any-return]

    def logits(self, x_BRD: Tensor) -> Tensor:
        """Of what the layers give."""
        return self.finish(self.lm_head(self.norm(x_BRD)))  # type: ignore[no-any-return]

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
