"""A decoder of fixed shapes, for accelerators: a step is the same instructions whatever came before it.

It is made of an ordinary decoder and computes with its modules, LoRA branches included. Each step takes the keys and
values of the steps before, masks and positions. It gives the keys and values of its own tokens, which the host keeps.

Shape suffixes: as in decoder.py; G query heads of a key/value head (H = K · G), C slots of a cache, T = C + S keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bedplate.model.decoder import Attention, Decoder, Layer, Places
from bedplate.model.parts import Cap, Scale
from bedplate.spec import mask_windows

_MOST_JOINED = 4  # XNNPACK's concatenation takes five values at most


@dataclass(frozen=True, kw_only=True)
class StaticStep(Places):
    """What all layers need of a step.

    masks: [1, S, T] by the window of a layer, added to scores. A query sees a key where it is 0.
    scale: of queries. cap: of scores.
    """

    masks: dict[int | None, Tensor]
    scale: nn.Module
    cap: nn.Module


class StaticAttention:
    """Attention of S tokens over C slots of a cache and over themselves, by the modules of an ordinary one.

    split_heads: products of one head each, and a cache for each key/value head. Heads are split after q, k and v were
    computed, so that a weight has one form, whichever program reads it, and so that LoRA branches stay.
    """

    def __init__(self, ordinary: Attention, *, length: int, slots: int, split_heads: bool) -> None:
        self.ordinary, self.length, self.slots, self.split_heads = ordinary, length, slots, split_heads

    def __call__(
        self, x: Tensor, caches: Sequence[Tensor], step: StaticStep
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What attention adds to the residual stream; and the keys and values of these tokens.

        caches: k [1, K, N, C], v [1, K, C, N]. With split heads, k [1, N, C] and v [1, C, N] of one head after the
        other. Keys stand in columns, as products want them. What is given has the form of `caches`, C being S.
        """
        of = self.ordinary
        q_BSHN, k_BSKN, v_BSKN = of.heads(x, step)
        q_HSN = step.scale(q_BSHN).permute(0, 2, 1, 3).reshape(of.n_heads, self.length, of.head_dim)
        k_BKNS, v_BKSN = k_BSKN.permute(0, 2, 3, 1), v_BSKN.permute(0, 2, 1, 3)
        given: tuple[Tensor, ...] = (k_BKNS, v_BKSN)
        if self.split_heads:
            parts = (k_BKNS, v_BKSN)
            given = tuple(_head(part, head) for head in range(of.n_kv_heads) for part in parts)
            y_HSN = self._one_by_one(q_HSN, given, caches, step)
        else:
            k, v, k_cache, v_cache = (part.reshape(part.shape[1:]) for part in (*given, *caches))
            y_HSN = self._attend(q_HSN, k, v, k_cache, v_cache, step)
        y = y_HSN.transpose(0, 1).reshape(1, self.length, of.n_heads * of.head_dim)
        return of.output(y), given

    def _one_by_one(
        self, q_HSN: Tensor, given: Sequence[Tensor], caches: Sequence[Tensor], step: StaticStep
    ) -> Tensor:
        group, heads = self.ordinary.n_heads // self.ordinary.n_kv_heads, []
        for head in range(self.ordinary.n_heads):
            k, v = (2 * (head // group), 2 * (head // group) + 1)
            q = q_HSN[head : head + 1]
            heads.append(self._attend(q, given[k], given[v], caches[k], caches[v], step))
        while len(heads) > 1:
            heads = [
                torch.cat(heads[i : i + _MOST_JOINED]) if len(heads) - i > 1 else heads[i]
                for i in range(0, len(heads), _MOST_JOINED)
            ]
        return heads[0]

    def _attend(
        self, q_HSN: Tensor, k_KNS: Tensor, v_KSN: Tensor, k_KNC: Tensor, v_KCN: Tensor, step: StaticStep
    ) -> Tensor:
        """[H, S, N]. Caches are read where they lie: to join them with what is new would copy them in each step."""
        heads, length, width = q_HSN.shape
        q = q_HSN.reshape(len(k_KNS), heads // len(k_KNS) * length, width)
        scores = torch.cat((torch.bmm(q, k_KNC), torch.bmm(q, k_KNS)), dim=-1)
        by_head = step.cap(scores).reshape(heads, length, self.slots + length)
        p = torch.softmax(by_head + step.masks[self.ordinary.window], dim=-1).reshape(scores.shape)
        y = torch.bmm(p[..., : self.slots], v_KCN) + torch.bmm(p[..., self.slots :], v_KSN)
        return y.reshape(q_HSN.shape)


def _head(x: Tensor, head: int) -> Tensor:
    """[1, K, …] → [1, …]. By a slice, which XNNPACK computes; it does not select."""
    return x[:, head : head + 1].reshape(1, *x.shape[2:])


class StaticDecoder(nn.Module):
    """A decoder for steps of `length` tokens. It has the modules of `ordinary`, under their names.

    one_row: a step gives the logits of one of its tokens. Otherwise of all.
    """

    def __init__(self, ordinary: Decoder, *, length: int, one_row: bool, split_heads: bool) -> None:
        super().__init__()
        spec, slots = ordinary.spec, ordinary.max_context
        self.length, self.slots, self.one_row, self.split_heads = length, slots, one_row, split_heads
        for name, module in ordinary.named_children():
            if module is not ordinary.masks:  # of steps of any length
                self.add_module(name, module)
        self.layers = nn.ModuleList(_without_caches(layer) for layer in ordinary.layers)
        self.attention_scale = Scale(spec.attention_scale)
        self.score_cap = nn.Identity() if spec.score_cap is None else Cap(spec.score_cap)
        # In tuples, which torch does not look into: modules keep the one name that they have.
        self._ordinary = (ordinary,)
        self._attention = tuple(
            StaticAttention(layer.self_attn, length=length, slots=slots, split_heads=split_heads)  # type: ignore[arg-type]
            for layer in ordinary.layers
        )
        self.windows = mask_windows(spec, slots)
        self.caches_of_layer = 2 * (spec.n_kv_heads if split_heads else 1)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Sequence[Tensor],
        caches: Sequence[Tensor],
        row: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits [1, S, V] of tokens int64 [1, S], and their keys and values in the order of `caches`.

        positions: int64 [S]. masks: [1, S, T] for each of `windows`. caches: of layer after layer, as StaticAttention
        takes them. row: int64 [1], the token whose logits [1, 1, V] a step of one row gives.
        """
        (of,) = self._ordinary
        step = self._step(of, positions, masks)
        x_BSD = of.embed(tokens)
        given: list[Tensor] = []
        for index, (layer, attention) in enumerate(zip(self.layers, self._attention, strict=True)):
            assert isinstance(layer, Layer)
            at = index * self.caches_of_layer
            own = caches[at : at + self.caches_of_layer]

            def attend(read: Tensor, own: Sequence[Tensor] = own, by: StaticAttention = attention) -> Tensor:
                y, keys_and_values = by(read, own, step)
                given.extend(keys_and_values)
                return y

            x_BSD = layer.around(x_BSD, attend)
        if row is not None:
            x_BSD = x_BSD.index_select(1, row)
        return of.logits(x_BSD), *given

    def _step(self, of: Decoder, positions: Tensor, masks: Sequence[Tensor]) -> StaticStep:
        factors = of.query_factors
        return StaticStep(
            rope=of.rope,
            tables=of.rope.chosen(positions),
            query_factors=None if factors is None else factors.factors.index_select(1, positions),
            masks=dict(zip(self.windows, masks, strict=True)),
            scale=self.attention_scale,
            cap=self.score_cap,
        )

    def example(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Inputs of the form that `forward` takes. All are different tensors: torch.export takes one for one input."""
        spec, length, slots = self._ordinary[0].spec, self.length, self.slots
        head = (1,) if self.split_heads else (1, spec.n_kv_heads)
        of_cache = ((*head, spec.head_dim, slots), (*head, slots, spec.head_dim))
        shapes = of_cache * (self.caches_of_layer // 2 * spec.n_layers)
        return (
            torch.zeros(1, length, dtype=torch.int64),
            torch.arange(length),
            tuple(torch.zeros(1, length, slots + length) for _ in self.windows),
            tuple(torch.zeros(shape) for shape in shapes),
            *([torch.zeros(1, dtype=torch.int64)] if self.one_row else []),
        )


def _without_caches(layer: nn.Module) -> nn.Module:
    layer = copy.copy(layer)
    layer._buffers = {}
    return layer
