"""The eager models that a bundle is compared with: the same decoder in PyTorch, float or quantized."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bedplate.assemble.bundle_structure import read_recipe
from bedplate.bundle.store import Bundle
from bedplate.model.adapter import read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.model.load import float_decoder
from bedplate.model.lora import LoRALinear
from bedplate.model.parts import RMSNorm
from bedplate.model.tokenizer_files import read_tokenizer
from bedplate.quantize.calibration import calibration_texts, input_statistics
from bedplate.quantize.eager import quantize_decoder
from bedplate.quantize.modules import QuantizedLinear
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.recipe import WEIGHT_ONLY, Recipe
from bedplate.quantize.weights import quantize_weight


def eager_decoder(
    model: Path,
    bundle: Bundle,
    adapter: Path | None = None,
    quantize: AdapterScheme = "none",
    *,
    calibration: Path | None = None,
) -> Decoder:
    """The decoder of `bundle`'s recipe and context, with `adapter` in its branches."""
    recipe, max_context = read_recipe(bundle), bundle.manifest.model["max_context"]
    base = _base(model, recipe, max_context, calibration)
    return base if adapter is None else _adapted(base, adapter, quantize)


@functools.cache
def _base(model: Path, recipe: Recipe, max_context: int, calibration: Path | None) -> Decoder:
    checkpoint = open_checkpoint(model)
    corrections = recipe.corrections(checkpoint.spec)
    decoder = float_decoder(checkpoint, max_context=max_context, corrections=corrections)
    statistics = {}
    if recipe.recovery_rank:
        tokenizer, positions = read_tokenizer(model).tokenizer_json, checkpoint.spec.max_positions
        texts = calibration_texts(calibration, tokenizer, positions, lambda text: None)
        statistics = input_statistics(checkpoint, texts, lambda done, total: None)
    return quantize_decoder(decoder, recipe, statistics)


def _adapted(base: Decoder, adapter: Path, quantize: AdapterScheme) -> Decoder:
    """A decoder with branches around the very modules of `base`: quantizing those again would take long."""
    loaded = read_adapter(adapter, base.spec)
    decoder = Decoder(
        base.spec,
        max_context=base.max_context,
        ranks=loaded.ranks,
        corrections=base.corrections,
        device="meta",
    )
    decoder.embed_tokens, decoder.norm, decoder.lm_head = base.embed_tokens, base.norm, base.lm_head
    for layer, of_base in zip(decoder.layers, base.layers, strict=True):
        for path, module in list(layer.named_modules()):
            if isinstance(module, RMSNorm):
                layer.set_submodule(path, of_base.get_submodule(path))
            elif isinstance(module, LoRALinear):
                module.linear = of_base.get_submodule(path)
            elif isinstance(module, nn.Linear) and not path.endswith((".linear", ".lora_a", ".lora_b")):
                layer.set_submodule(path, of_base.get_submodule(path))
    for path, a, b in loaded.matrices():
        for half, value in (("lora_a", a), ("lora_b", b)):
            decoder.set_submodule(f"{path}.{half}", _branch(torch.from_numpy(value.copy()), quantize))
    return decoder.eval()


def _branch(weight: torch.Tensor, quantize: AdapterScheme) -> nn.Module:
    if quantize == "8w":
        return QuantizedLinear(quantize_weight(weight, WEIGHT_ONLY))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def eager_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """float32 [T, vocab], from an empty cache."""
    decoder.reset_cache()
    with torch.no_grad():
        ids = torch.tensor([tokens])
        return decoder(ids, torch.tensor([0]), torch.zeros(len(tokens)))[0]  # type: ignore[no-any-return]


def check_quantized(
    ours: NDArray[np.float32], decoder: Decoder, *texts: list[int], noise: float = 0.05
) -> float:
    """Logits [T, vocab] of texts, one after the other, are as near to what the quantized weights of `decoder` alone
    cost as its own are.

    The decoder rounds each row of activations to 8 bits, as XNNPACK does. bedplate rounds groups of them, which costs
    about the same in rows as narrow as the toy's. noise: the most that this may cost, beside the spread of logits.
    Returns what it costs.
    """
    rows, exact = (
        np.concatenate([eager_logits(one, text).numpy() for text in texts])
        for one in (decoder, _exact(decoder))
    )
    cost = np.abs(rows - exact)
    assert 0 < np.median(cost) < noise * exact.std()
    assert np.median(np.abs(ours - exact)) < 1.2 * np.median(cost)
    kept = [(one.argmax(axis=1) == exact.argmax(axis=1)).mean() for one in (ours, rows)]
    assert kept[0] > kept[1] - 0.1
    return float(np.median(cost))


def _exact(decoder: Decoder) -> Decoder:
    """The decoder with its quantized weights, and activations as they are."""
    decoder = copy.deepcopy(decoder)
    for module in decoder.modules():
        if isinstance(module, QuantizedLinear):
            module.weight_only = True
    return decoder
