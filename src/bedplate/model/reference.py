"""The float model over a text, one layer in memory at a time: what its linears see, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bedplate.model.checkpoint import Checkpoint, checked_tensor
from bedplate.model.decoder import rope_table
from bedplate.spec import ModelSpec

# Called with the place of a correction (`self_attn.input_correction`) and the input of its linears, float32 [S, in].
Note = Callable[[int, str, Tensor], None]


def sequences(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Tokens cut into runs of `length`, each a text of its own."""
    return [list(tokens[at : at + length]) for at in range(0, len(tokens), length)]


def hidden_states(
    checkpoint: Checkpoint,
    texts: Sequence[Sequence[int]],
    *,
    updates: Callable[[str], Tensor | None] = lambda path: None,
    note: Note = lambda layer, place, x: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """What the final norm gives for each text (token ids), float32 [S, dim].

    updates: what to add to the weight of the linear at a module path. progress(done, total) counts layers.
    Raises CheckpointError for values that are not finite.
    """
    states, n_layers = HiddenStates(checkpoint, texts, note=note), checkpoint.spec.n_layers
    for layer in range(n_layers):
        progress(layer, n_layers)
        weights = layer_weights(checkpoint, layer)
        for name in weights:
            update = updates(f"layers.{layer}.{name.removesuffix('.weight')}")
            weights[name] = weights[name] if update is None else weights[name] + update
        states.advance(layer, weights)
    progress(n_layers, n_layers)
    return states.normed()


def layer_weights(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """A layer's parameters by their names in it, float32. Raises CheckpointError for values that are not finite."""
    first = "layers.0."
    names = [name.removeprefix(first) for name in checkpoint.shapes() if name.startswith(first)]
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
        self._hidden = [embedding[torch.tensor(ids)].float() for ids in texts]
        tables = rope_table(spec.rope, spec.head_dim, max(map(len, texts)))
        self._cos, self._sin = (
            table[0].transpose(0, 1) for table in tables
        )  # [1, C, N]: heads come first here

    def advance(self, layer: int, weights: Mapping[str, Tensor]) -> None:
        """Through the layer of this index, with weights as `layer_weights` gives them."""
        run = _Layer(self._checkpoint.spec, weights, layer, self._note, self._activations)
        self._hidden = [run(x, self._cos[:, : len(x)], self._sin[:, : len(x)]) for x in self._hidden]

    def normed(self) -> list[Tensor]:
        """What the final norm gives for each text, float32 [S, dim]."""
        spec, weight = self._checkpoint.spec, self._checkpoint.tensor("norm.weight").float()
        return [F.rms_norm(x_SD, (spec.dim,), weight, spec.norm_eps) for x_SD in self._hidden]


def head_weight(checkpoint: Checkpoint) -> Tensor:
    """Float32 [vocab, dim]."""
    return checkpoint.tensor("embed_tokens.weight" if checkpoint.spec.tied_head else "lm_head.weight").float()


def logits(hidden: Tensor, head: Tensor, *, rows: int = 64) -> Iterator[Tensor]:
    """Logits of a text, float32 [up to `rows`, vocab] at a time."""
    return (F.linear(block, head) for block in torch.split(hidden, rows))


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
        self._spec, self._weights, self._index = spec, weights, index
        self._note, self._activations = note, activations

    def __call__(self, x_SD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self._norm("input_layernorm", x_SD, "self_attn.input_correction")
        q, k, v = (self._heads(self._linear(f"self_attn.{name}_proj", x)) for name in "qkv")
        q, k = (heads * cos + _rotate_half(heads) * sin for heads in (q, k))
        y_HSN = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        y = y_HSN.transpose(0, 1).reshape(len(x_SD), -1)
        self._note(self._index, "self_attn.output_correction", y)
        x_SD = x_SD + self._linear("self_attn.o_proj", y)
        x = self._norm("post_attention_layernorm", x_SD, "mlp.input_correction")
        y = F.silu(self._linear("mlp.gate_proj", x)) * self._linear("mlp.up_proj", x)
        self._note(self._index, "mlp.output_correction", y)
        return x_SD + self._linear("mlp.down_proj", y)

    def _norm(self, name: str, x_SD: Tensor, place: str) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        x: Tensor = F.rms_norm(x_SD, (self._spec.dim,), weight, self._spec.norm_eps)
        self._note(self._index, place, x)
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return F.linear(self._activations(x), weight, bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._spec.head_dim).transpose(0, 1)


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
