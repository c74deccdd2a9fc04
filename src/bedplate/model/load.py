"""A float decoder with a checkpoint's weights: the model that everything else is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bedplate.model.checkpoint import Checkpoint, checked_tensors, tied_names
from bedplate.model.decoder import Correction, Decoder
from bedplate.model.lora import LoRALinear


def float_decoder(
    checkpoint: Checkpoint,
    *,
    max_context: int,
    ranks: Mapping[str, int] | None = None,
    corrections: Mapping[str, int] | None = None,
) -> Decoder:
    """A float32 Decoder. Its LoRA branches and corrections, if any, start as no-ops."""
    spec = checkpoint.spec
    decoder = Decoder(spec, max_context=max_context, ranks=ranks, corrections=corrections, device="meta")
    for name, tensor in checked_tensors(checkpoint):
        for target in tied_names(name, checkpoint.spec):
            set_parameter(decoder, target, tensor.float())
    for module in decoder.modules():
        if isinstance(module, LoRALinear):
            for branch in (module.lora_a, module.lora_b):
                branch.to_empty(device="cpu")
            module.reset_lora_parameters()
        elif isinstance(module, Correction):
            for linear in module.children():
                linear.to_empty(device="cpu")
                nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
    return decoder.eval()


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter `name`; the name of a LoRALinear's `weight` or `bias` means its base linear's."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, LoRALinear):
        parent = parent.linear
    setattr(parent, leaf, nn.Parameter(value, requires_grad=False))
