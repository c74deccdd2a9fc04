"""The float model over a text, one layer in memory at a time: what its linears see, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bedplate.model.checkpoint import Checkpoint, checked_tensor
from bedplate.model.parts import activation, attend, finished, query_factors, rope_table
from bedplate.spec import ModelSpec

# Called with the place of a correction (`self_attn.input_correction`) and the input of its linears, float32 [S, in].
Note = Callable[[int, str, Tensor], None]


def hidden_states(
    checkpoint: Checkpoint,
    texts: Sequence[Sequence[int]],
    *,
    note: Note = lambda layer, place, x: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """What the final norm gives for each text (token ids), float32 [S, dim].

    progress(done, total) counts layers.
    Raises CheckpointError for values that are not finite.
    """
    states, n_layers = HiddenStates(checkpoint, texts, note=note), checkpoint.spec.n_layers
    for layer in range(n_layers):
        progress(layer, n_layers)
        states.advance(layer, layer_weights(checkpoint, layer))
    progress(n_layers, n_layers)
    return states.normed()


def layer_weights(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """A layer's parameters by their names in it, float32. Raises CheckpointError for values that are not finite."""
    first = "layers.0."
    names = [name.removeprefix(first) for name in checkpoint.names() if name.startswith(first)]
    return {name: checked_tensor(checkpoint, f"layers.{layer}.{name}").float() for name in names}


class HiddenStates:
    """Texts (token ids) on their way through the layers: `advance` through each in turn, then `normed`.

    activations: what is done to the input of each linear.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        texts: Sequence[Sequence[int]],
        *,
        note: Note = lambda layer, place, x: None,
        activations: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self._checkpoint, self._note, self._activations = checkpoint, note, activations
        spec = checkpoint.spec
        embedding = checkpoint.tensor("embed_tokens.weight")
        self._texts = [
            _Text(hidden=embedding[torch.tensor(ids)].float() * spec.embedding_scale, spec=spec)
            for ids in texts
        ]

    def advance(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Through the layer of this index, with weights as `layer_weights` gives them."""
        run = _Layer(self._checkpoint.spec, weights, layer, self._note, self._activations)
        for text in self._texts:
            text.hidden = run(text)

    def normed(self) -> list[Tensor]:
        """What the final norm gives for each text, float32 [S, dim]."""
        spec = self._checkpoint.spec
        names = [name for name in self._checkpoint.names() if name.startswith("norm.")]
        weights = {name: self._checkpoint.tensor(name).float() for name in names}
        return [_normed("norm", text.hidden, weights, spec) for text in self._texts]


class _Text:
    """A text on its way: its hidden states [S, dim], and cos and sin [S, 1, N] of each rotary embedding."""

    def __init__(self, hidden: Tensor, spec: ModelSpec) -> None:
        self.hidden, length = hidden, len(hidden)
        self.tables = [tuple(x[0] for x in rope_table(table, length, length=length)) for table in spec.ropes]
        growth = spec.query_growth
        self.query_factors = None if growth is None else query_factors(growth, length)[0]


def head_weight(checkpoint: Checkpoint) -> Tensor:
    """Float32 [vocab, dim]."""
    return checkpoint.tensor("embed_tokens.weight" if checkpoint.spec.tied_head else "lm_head.weight").float()


def head_bias(checkpoint: Checkpoint) -> Tensor | None:
    """Float32 [vocab], which only an adapter's head has. None: there is none."""
    return checkpoint.tensor("lm_head.bias").float() if "lm_head.bias" in checkpoint.names() else None


def logits(
    hidden: Tensor, head: Tensor, spec: ModelSpec, *, bias: Tensor | None = None, rows: int = 64
) -> Iterator[Tensor]:
    """Logits of a text, float32 [up to `rows`, vocab] at a time."""
    finish = finished(spec)
    return (finish(F.linear(block, head, bias)) for block in torch.split(hidden, rows))


class _Layer:
    """One layer of float weights, by their names in it."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        index: int,
        note: Note,
        activations: Callable[[Tensor], Tensor],
    ) -> None:
        self._spec, self._weights, self._index, self._layer = spec, weights, index, spec.layers[index]
        self._note, self._activations = note, activations

    def __call__(self, text: _Text) -> Tensor:
        x = text.hidden
        read = self._norm("attention_norm", x)
        self._note(self._index, "self_attn.input_correction", read)
        y = self._norm("attention_output_norm", self._attention(read, text))
        between = x + y * self._spec.residual_scale
        if not self._spec.parallel:
            read = self._norm("mlp_norm", between)
        self._note(self._index, "mlp.input_correction", read)
        return between + self._norm("mlp_output_norm", self._mlp(read)) * self._spec.residual_scale

    def _attention(self, x: Tensor, text: _Text) -> Tensor:
        q, k, v = (self._linear(f"self_attn.{name}_proj", x) for name in "qkv")
        if self._spec.qk_norm == "whole":
            q, k = self._rms("q", q), self._rms("k", k)
        q, k, v = (heads.view(len(x), -1, self._spec.head_dim) for heads in (q, k, v))
        if self._spec.qk_norm == "head":
            q, k = self._rms("q", q), self._rms("k", k)
        if self._layer.rope is not None:
            cos, sin = text.tables[self._layer.rope]
            q, k = (heads * cos + _rotate_half(heads) * sin for heads in (q, k))
        if text.query_factors is not None:
            q = q * text.query_factors
        scale, cap = self._spec.attention_scale, self._spec.score_cap
        y = attend(q, k, v, first=0, scale=scale, window=self._layer.window, cap=cap).reshape(len(x), -1)
        self._note(self._index, "self_attn.output_correction", y)
        return self._linear("self_attn.o_proj", y)

    def _mlp(self, x: Tensor) -> Tensor:
        act = activation(self._spec.activation)
        up = self._linear("mlp.up_proj", x)
        y: Tensor = act(self._linear("mlp.gate_proj", x)) * up if self._spec.gated else act(up)
        self._note(self._index, "mlp.output_correction", y)
        return self._linear("mlp.down_proj", y)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return _normed(name, x, self._weights, self._spec)

    def _rms(self, part: str, x: Tensor) -> Tensor:
        weight = self._weights[f"self_attn.{part}_norm.weight"]
        return F.rms_norm(x, weight.shape, weight, self._spec.norm_eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return F.linear(self._activations(x), weight, bias)


def _normed(name: str, x: Tensor, weights: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
    """By the norm of this name. The layers of a model may have none there, and x stays as it is."""
    weight = weights.get(f"{name}.weight")
    if weight is None:
        return x
    if spec.norm == "layer":
        return F.layer_norm(x, weight.shape, weight, weights.get(f"{name}.bias"), spec.norm_eps)
    return F.rms_norm(x, weight.shape, weight, spec.norm_eps)


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
