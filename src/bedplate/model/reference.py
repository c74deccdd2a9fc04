"""The float model over a text, one layer in memory at a time: what its linears see, and its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bedplate.model.checkpoint import Checkpoint, checked_tensor
from bedplate.model.decoder import rope_table
from bedplate.model.spec import ModelSpec

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
    spec = checkpoint.spec
    embedding = checkpoint.tensor("embed_tokens.weight")
    hidden = [embedding[torch.tensor(ids)].float() for ids in texts]
    del embedding
    tables = rope_table(spec.rope, spec.head_dim, max(map(len, texts)))
    cos, sin = (table[0].transpose(0, 1) for table in tables)  # [1, C, N]: heads come first here
    names = [name.removeprefix("layers.0.") for name in checkpoint.shapes() if name.startswith("layers.0.")]
    for layer in range(spec.n_layers):
        progress(layer, spec.n_layers)
        weights = {name: checked_tensor(checkpoint, f"layers.{layer}.{name}").float() for name in names}
        for name in names:
            update = updates(f"layers.{layer}.{name.removesuffix('.weight')}")
            weights[name] = weights[name] if update is None else weights[name] + update
        run = _Layer(spec, weights, layer, note)
        hidden = [run(x_SD, cos[:, : len(x_SD)], sin[:, : len(x_SD)]) for x_SD in hidden]
    progress(spec.n_layers, spec.n_layers)
    weight = checkpoint.tensor("norm.weight").float()
    return [F.rms_norm(x_SD, (spec.dim,), weight, spec.norm_eps) for x_SD in hidden]


def head_weight(checkpoint: Checkpoint) -> Tensor:
    """Float32 [vocab, dim]."""
    return checkpoint.tensor("embed_tokens.weight" if checkpoint.spec.tied_head else "lm_head.weight").float()


def logits(hidden: Tensor, head: Tensor, *, rows: int = 64) -> Iterator[Tensor]:
    """Logits of a text, float32 [up to `rows`, vocab] at a time."""
    return (F.linear(block, head) for block in torch.split(hidden, rows))


class _Layer:
    """One layer of float weights, by their names in it."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], index: int, note: Note) -> None:
        self._spec, self._weights, self._index, self._note = spec, weights, index, note

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
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._spec.head_dim).transpose(0, 1)


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)
