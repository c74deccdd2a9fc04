"""The float model with an adapter of a bundle, as a checkpoint: what the adapter's constants make of its weights."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bedplate.bundle.named import NamedConstants
from bedplate.bundle.store import AdapterEntry
from bedplate.bundle.values import Values
from bedplate.model.checkpoint import Checkpoint
from bedplate.spec import ModelSpec, linear_shapes

_TABLES = ("embed_tokens", "lm_head")


class Adapted:
    """A checkpoint. Branches, factors and shifts are merged into weights and biases, the scales of codes into A and B.

    spec: of the model with the adapter's own layers and tokens. Its head is never tied.
    """

    def __init__(self, checkpoint: Checkpoint, entry: AdapterEntry, foundation: Path) -> None:
        self._checkpoint, base = checkpoint, checkpoint.spec
        self.path, self.files = checkpoint.path, checkpoint.files
        info = entry.read_info()
        self._layers = tuple(range(base.n_layers)) if info.layers is None else info.layers
        self.spec: ModelSpec = replace(
            base,
            layers=tuple(base.layers[layer] for layer in self._layers),
            vocab_size=info.vocab,
            tied_head=False,
        )
        self._files = ExitStack()
        shared = self._files.enter_context(NamedConstants(foundation, info.shared))
        named = NamedConstants(entry.weights, (*info.constants, *info.shared), beside=shared)
        self._values = Values(self._files.enter_context(named), base, info.ranks)
        self._linears = linear_shapes(base)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def found(self) -> dict[str, tuple[int, ...]]:
        return self._checkpoint.found()

    def wanted(self) -> dict[str, tuple[int, ...]]:
        return self._checkpoint.wanted()

    def names(self) -> list[str]:
        """With a bias of each linear."""
        first = "layers.0."
        names = [name for name in self._checkpoint.names() if not name.startswith(("layers.", "lm_head."))]
        in_layer = {name.removeprefix(first) for name in self._checkpoint.names() if name.startswith(first)}
        in_layer |= {f"{linear}.bias" for linear in self._linears}
        names += [f"layers.{layer}.{name}" for layer in range(len(self._layers)) for name in sorted(in_layer)]
        return [*names, "lm_head.weight", "lm_head.bias"]

    def tensor(self, name: str) -> Tensor:
        """float32."""
        path, _, leaf = name.rpartition(".")
        if path == "embed_tokens":
            return self._embedding()
        if path == "lm_head":
            return self._head() if leaf == "weight" else self._bias(path, path, self.spec.vocab_size)
        _, _, linear = path.split(".", 2) if path.startswith("layers.") else ("", "", "")
        base = path
        if linear:
            layer = int(path.split(".")[1])
            base = f"layers.{self._layers[layer]}.{linear}"
        if linear not in self._linears:
            return self._own(name) if self._values.has(name) else self._base(f"{base}.{leaf}")
        if leaf == "bias":
            return self._bias(path, base, self._linears[linear][0])
        return self._factor(path, self._branch(path, self._base(f"{base}.weight")))

    def _base(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name).float()

    def _own(self, name: str) -> Tensor:
        return torch.from_numpy(self._values.floats(name, self._base_shape(name)))

    def _base_shape(self, name: str) -> int:
        path, _, leaf = name.rpartition(".")
        if path.startswith("layers."):
            _, _, module = path.split(".", 2)
            path = f"layers.0.{module}"
        return len(self._checkpoint.tensor(f"{path}.{leaf}"))

    def _branch(self, path: str, weight: Tensor) -> Tensor:
        halves = [f"{path}.{half}.weight" for half in ("lora_a", "lora_b")]
        if not self._values.has(halves[0]):
            return weight
        a, b = (torch.from_numpy(self._values.matrix(half)) for half in halves)
        return weight + b @ a

    def _factor(self, path: str, weight: Tensor) -> Tensor:
        if not self._values.has(f"{path}.factor"):
            return weight
        return torch.from_numpy(self._values.floats(f"{path}.factor", len(weight))).unsqueeze(1) * weight

    def _bias(self, path: str, base: str, rows: int) -> Tensor:
        bias = torch.zeros(rows)
        if f"{base}.bias" in self._checkpoint.names():
            bias = self._base(f"{base}.bias")
        if self._values.has(f"{path}.factor"):
            bias = bias * torch.from_numpy(self._values.floats(f"{path}.factor", rows))
        if self._values.has(f"{path}.shift"):
            bias = bias + torch.from_numpy(self._values.floats(f"{path}.shift", rows))
        return bias

    def _table(self, table: str) -> Tensor:
        if self._values.has(f"{table}.weight"):
            return torch.from_numpy(self._values.matrix(f"{table}.weight"))
        tied = self._checkpoint.spec.tied_head
        weight = self._base("embed_tokens.weight" if tied else f"{table}.weight")
        # The rows of further tokens come after.
        return torch.nn.functional.pad(weight, (0, 0, 0, self.spec.vocab_size - len(weight)))

    def _embedding(self) -> Tensor:
        weight = self._table("embed_tokens")
        if self._values.has("embed_tokens.lora_a.weight"):
            a, b = (self._values.matrix(f"embed_tokens.{half}.weight") for half in ("lora_a", "lora_b"))
            weight = weight + torch.from_numpy(a @ b.T)
        return self._with_rows("embed_tokens", weight)

    def _head(self) -> Tensor:
        weight = self._factor("lm_head", self._branch("lm_head", self._table("lm_head")))
        return self._with_rows("lm_head", weight)

    def _with_rows(self, table: str, weight: Tensor) -> Tensor:
        if not self._values.has(f"{table}.rows.ids"):
            return weight
        weight = weight.clone()
        ids = torch.from_numpy(self._values.ids(f"{table}.rows.ids"))
        weight[ids] = torch.from_numpy(self._values.matrix(f"{table}.rows.weight"))
        return weight
