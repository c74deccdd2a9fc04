"""A linear with a low-rank branch: y = x Wᵀ + b + (x Aᵀ) Bᵀ.

The LoRA scaling (alpha / r) has no place of its own: it is folded into B when an adapter is packed.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from bedplate.errors import CheckpointError


class LoRALinear(nn.Module):
    """`linear` [out, in] plus `lora_b` [out, rank] · `lora_a` [rank, in].

    A checkpoint from before `linear` was a submodule (`weight`, `bias`) loads too: its names are mapped on the way
    in. One that holds both forms raises CheckpointError.
    """

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, bias: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.linear: nn.Module = nn.Linear(in_features, out_features, bias=bias, device=device)
        self.lora_a: nn.Module = nn.Linear(in_features, rank, bias=False, device=device)
        self.lora_b: nn.Module = nn.Linear(rank, out_features, bias=False, device=device)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.reset_lora_parameters()
        self.register_load_state_dict_pre_hook(_map_old_names)  # type: ignore[no-untyped-call]

    def reset_lora_parameters(self) -> None:
        """A from the usual uniform start, B zero: the branch begins as a no-op (LoRA, section 4.1)."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))  # type: ignore[arg-type]
        nn.init.zeros_(self.lora_b.weight)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The base linear's weight, so that code that expects an nn.Linear goes on working."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base linear's bias."""
        return self.linear.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora_b(self.lora_a(x))  # type: ignore[no-any-return]


def _map_old_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # load_state_dict hands each child a dict of its own, so the caller's is not touched; the very top one is
    # a copy as well.
    for name in ("weight", "bias"):
        old, new = f"{prefix}{name}", f"{prefix}linear.{name}"
        if old not in state_dict:
            continue
        if new in state_dict:
            raise CheckpointError(
                f"holds both {old} and {new}",
                where="state dict",
                hint="keep one of the two: they name the same parameter",
            )
        state_dict[new] = state_dict.pop(old)


def is_lora_branch(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module at `path` is the `lora_a` or `lora_b` of a LoRALinear (by structure, not by name)."""
    parent, _, leaf = path.rpartition(".")
    return leaf in ("lora_a", "lora_b") and isinstance(modules.get(parent), LoRALinear)


def is_lora_base(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module at `path` is the base `linear` of a LoRALinear."""
    parent, _, leaf = path.rpartition(".")
    return leaf == "linear" and isinstance(modules.get(parent), LoRALinear)
