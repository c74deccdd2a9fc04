"""What decoders are made of: norms, rotary embedding, activations and attention.

All but `attend` is written so that XNNPACK takes it into a delegate. Shape suffixes: as in decoder.py; T keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bedplate.spec import ModelSpec, QueryGrowth, RopeTable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension.

    mean(x²) + eps is a linear with one row of 1/D and eps as its bias: the partitioner refuses `mean`.
    """

    mean_row: Tensor
    eps: Tensor

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("mean_row", torch.full((1, dim), 1.0 / dim), persistent=False)
        self.register_buffer("eps", torch.full((1,), eps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x * x, self.mean_row, self.eps)
        return x * torch.rsqrt(mean) * self.weight


class LayerNorm(RMSNorm):
    """As RMSNorm, of x less its mean; and it may add a bias."""

    def __init__(self, dim: int, eps: float, *, bias: bool) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x - F.linear(x, self.mean_row))
        return y if self.bias is None else y + self.bias


class Rope(nn.Module):
    """Rotary position embedding: tables of cos and sin, and rotate-half as a linear. Without tables it holds nothing.

    rotate_half(x) = [-x₂, x₁] is x Rᵀ with R of 0 and ±1: exact, and, unlike slices, inside the delegate.
    """

    rotation: Tensor

    def __init__(self, tables: Sequence[RopeTable], head_dim: int, max_context: int) -> None:
        super().__init__()
        for number, table in enumerate(tables):
            cos, sin = rope_table(table, max_context)
            self.register_buffer(f"cos_{number}", cos, persistent=False)
            self.register_buffer(f"sin_{number}", sin, persistent=False)
        self.count = len(tables)
        if not tables:
            return
        half = head_dim // 2
        rotation, one = torch.zeros(head_dim, head_dim, device="cpu"), torch.eye(half, device="cpu")
        rotation[:half, half:], rotation[half:, :half] = -one, one
        self.register_buffer("rotation", rotation, persistent=False)

    def at(self, pos: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin [1, S, 1, N] of each table for positions pos … pos + length - 1."""
        return [
            (
                self.get_buffer(f"cos_{number}").narrow(1, pos, length),
                self.get_buffer(f"sin_{number}").narrow(1, pos, length),
            )
            for number in range(self.count)
        ]

    def chosen(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `at`, for any positions int64 [S]."""
        return [
            (
                self.get_buffer(f"cos_{number}").index_select(1, positions),
                self.get_buffer(f"sin_{number}").index_select(1, positions),
            )
            for number in range(self.count)
        ]

    def forward(self, x_BSHN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x_BSHN * cos + F.linear(x_BSHN, self.rotation) * sin


def rope_table(table: RopeTable, max_context: int, *, length: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [1, C, 1, N], as transformers computes them.

    length: of the sequence that they are for. None: as long as the context allows.
    """
    long = table.long
    is_long = long is not None and (max_context if length is None else length) > long.above
    # Also for a model of shapes alone: for arithmetic on "meta", torch imports its compiler, which takes a second.
    inv_freq = torch.tensor(long.frequencies if long and is_long else table.frequencies, device="cpu")
    angles = torch.arange(max_context, device="cpu").float()[:, None] * inv_freq[None, :]
    scale = torch.where(inv_freq == 0, 1.0, table.scale)
    cos, sin = (
        torch.cat((half, half), dim=-1).view(1, max_context, 1, 2 * len(inv_freq))
        for half in (angles.cos() * scale, angles.sin() * scale)
    )
    return cos, sin


class Scale(nn.Module):
    """x · factor. A number that is no buffer would be a constant without a name in the lowered program."""

    factor: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([factor]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scaled(factor: float) -> nn.Module:
    """x · factor; nothing is computed for a factor of 1."""
    return nn.Identity() if factor == 1 else Scale(factor)


class Cap(nn.Module):
    """limit · tanh(x / limit)."""

    limit: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor([limit]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / self.limit) * self.limit


def finished(spec: ModelSpec) -> nn.Module:
    """What makes logits of what the head gives."""
    cap = nn.Identity() if spec.logit_cap is None else Cap(spec.logit_cap)
    return nn.Sequential(scaled(spec.logit_scale), cap)


class QueryFactors(nn.Module):
    """What queries are multiplied with, by their positions: a table [1, C, 1, 1]."""

    factors: Tensor

    def __init__(self, growth: QueryGrowth, max_context: int) -> None:
        super().__init__()
        self.register_buffer("factors", query_factors(growth, max_context), persistent=False)

    def at(self, pos: int, length: int) -> Tensor:
        return self.factors.narrow(1, pos, length)


def query_factors(growth: QueryGrowth, max_context: int) -> Tensor:
    """Float32 [1, C, 1, 1]."""
    steps = torch.floor(torch.arange(max_context) / growth.original_positions)
    return (1 + growth.beta * torch.log(1 + steps)).view(1, max_context, 1, 1)


class GeluTanh(nn.Module):
    """GELU as transformers' gelu_pytorch_tanh: x · sigmoid(x · (k + c · x²)) is x / 2 · (1 + tanh(…)).

    The lowering takes F.gelu(approximate="tanh"), but drops what is approximate in it.
    """

    k: Tensor
    c: Tensor

    def __init__(self) -> None:
        super().__init__()
        k = 2 * math.sqrt(2 / math.pi)
        self.register_buffer("k", torch.tensor([k]), persistent=False)
        self.register_buffer("c", torch.tensor([k * 0.044715]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * (self.k + x * x * self.c))


class SquaredRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        return y * y


def activation(kind: str) -> nn.Module:
    """The module of `ModelSpec.activation`."""
    kinds: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu_tanh": GeluTanh, "relu2": SquaredRelu}
    return kinds[kind]()


def attend(
    q_SHN: Tensor,
    k_TKN: Tensor,
    v_TKN: Tensor,
    *,
    first: int,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """Attention of the queries at positions from `first` on over keys and values from position 0 on, [S, H, N]."""
    at = torch.arange(first, first + len(q_SHN))[:, None]
    keys = torch.arange(len(k_TKN))[None, :]
    seen = keys <= at if window is None else (keys <= at) & (keys > at - window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHN, k_TKN, v_TKN))
    if cap is None:
        y = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    else:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.tanh(q @ k.mT * scale / cap) * cap
        y = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ v
    return y[0].transpose(0, 1).contiguous()
