"""What codes of fewer bits would lose: mean KL against the float model, by weights alone.

    python benchmarks/smaller_codes.py MODEL TEXT [--positions N] 2>/dev/null

Weights are rounded and computed in float32, so that what is lost is lost by the codes. Prints a line a variant.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.model.load import float_decoder
from bedplate.model.tokenizer_files import read_tokenizer

SEQUENCE, GROUP = 512, 32
LAYERS = "layers.*_proj.weight"
# (pattern of parameters, bits): the first that matches counts. 8 bits have a scale a row. Fewer have groups of 32,
# each with a scale and an offset.
VARIANTS: dict[str, list[tuple[str, int]]] = {
    "default: layers 4, head 8": [(LAYERS, 4), ("lm_head.weight", 8), ("embed_tokens.weight", 8)],
    "head 4": [(LAYERS, 4), ("lm_head.weight", 4), ("embed_tokens.weight", 8)],
    "head 4, embedding 4": [(LAYERS, 4), ("lm_head.weight", 4), ("embed_tokens.weight", 4)],
    "gate and up 3": [("*.gate_proj.weight", 3), ("*.up_proj.weight", 3), (LAYERS, 4), ("*", 8)],
    "q and k 3": [("*.q_proj.weight", 3), ("*.k_proj.weight", 3), (LAYERS, 4), ("*", 8)],
    "layers 3": [(LAYERS, 3), ("*", 8)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--positions", type=int, default=2048)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(options.model).tokenizer_json.decode())
    ids = tokenizer.encode(options.text.read_text()).ids[: options.positions]
    with torch.inference_mode():
        decoder = float_decoder(checkpoint, max_context=SEQUENCE)
        expected = log_probabilities(decoder, ids)
        originals = {name: value.detach().clone() for name, value in decoder.named_parameters()}
        for variant, rules in VARIANTS.items():
            for name, value in decoder.named_parameters():
                bits = next((bits for pattern, bits in rules if fnmatchcase(name, pattern)), None)
                original = originals[name]
                value.data = original if bits is None or original.ndim < 2 else rounded(original, bits)
            found = log_probabilities(decoder, ids)
            kl = sum(float((e.exp() * (e - f)).sum()) for e, f in zip(expected, found, strict=True)) / len(
                ids
            )
            print(f"{variant}: mean KL {kl:.4f} over {len(ids)} positions", flush=True)


def log_probabilities(decoder: Decoder, ids: list[int]) -> list[Tensor]:
    """Of each run of SEQUENCE tokens, float32 [tokens, vocabulary]."""
    found = []
    for start in range(0, len(ids), SEQUENCE):
        tokens = torch.tensor([ids[start : start + SEQUENCE]])
        decoder.reset_cache()
        logits = decoder(tokens, torch.tensor([0]), torch.zeros(tokens.shape[1]))
        found.append(logits[0].log_softmax(-1))
    return found


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight that codes of so many bits stand for, float32 [rows, columns]."""
    if bits == 8:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale).round() * scale
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = groups, torch.full_like(low, torch.inf)
    for share in (1.0, 0.94, 0.88, 0.82, 0.76):
        middle, scale = (high + low) / 2, (high - low) * share / (2**bits - 1)
        start = middle - scale * (2**bits - 1) / 2
        value = ((groups - start) / scale.clamp_min(1e-30)).round().clamp(0, 2**bits - 1) * scale + start
        error = (groups - value).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, value, best), torch.minimum(error, least)
    return best.view(weight.shape)


if __name__ == "__main__":
    main()
