"""Each delegate against the same quantized modules in eager PyTorch, on the same inputs.

What differs: both quantize activations to 8 bits a row, XNNPACK from its own minimum and maximum with its own
rounding; where a value lies on the border of two codes they may choose differently, a step of 1/255 of the row's
range. Weights do not differ: group scales are rounded to bfloat16 where they are chosen, so both see one value.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delegates import cut_delegate
from eager import eager_decoder
from stock import StockProgram
from torch import Tensor

from bedplate import Bundle
from bedplate.model.decoder import Decoder

pytestmark = pytest.mark.real_model


def layer_inputs(decoder: Decoder, tokens: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """What goes into each layer's delegates in eager: the residual stream before layer i (and after the last), the
    attention output of layer i, and RoPE's cos and sin."""
    streams: list[Tensor] = []
    attended: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for layer in decoder.layers
    ] + [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
        for layer in decoder.layers
    ]
    decoder.reset_cache()
    with torch.no_grad():
        decoder(torch.tensor([tokens]), torch.tensor([0]), torch.zeros(1))
    for hook in hooks:
        hook.remove()
    ((cos, sin),) = decoder.rope.at(0, len(tokens))
    return streams, attended, cos, sin


def qkv(decoder: Decoder, index: int, x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """v, q, k of a layer, RoPE applied: what the delegate before its attention gives, in its order."""
    attention, spec = decoder.layers[index].self_attn, decoder.spec
    h = decoder.layers[index].attention_norm(x)
    q, k, v = attention.project(h)
    k = decoder.rope(k.view(1, -1, spec.n_kv_heads, spec.head_dim), cos, sin)
    q = decoder.rope(q.view(1, -1, spec.n_heads, spec.head_dim), cos, sin)
    return [v.view(1, -1, spec.n_kv_heads, spec.head_dim), q, k]


def test_delegates_compute_what_their_modules_compute(
    quantized_bundle: Bundle, smollm2: Path, prose: list[int], tmp_path: Path
) -> None:
    decoder = eager_decoder(smollm2, quantized_bundle)
    tokens = prose[:64]
    streams, attended, cos, sin = layer_inputs(decoder, tokens)
    n_layers = decoder.spec.n_layers
    heads = (1, len(tokens), decoder.spec.n_heads, decoder.spec.head_dim)
    worst: dict[str, float] = {}
    # The first two and the last three differ; those between are linked of one, and every third is enough.
    for index in sorted({0, 1, *range(2, n_layers, 3), n_layers - 1, n_layers, n_layers + 1}):
        with torch.no_grad():
            if index == 0:
                inputs, expected = [streams[0], cos, sin], qkv(decoder, 0, streams[0], cos, sin)
            elif index <= n_layers:
                layer = decoder.layers[index - 1]
                x = streams[index - 1] + layer.self_attn.output(attended[index - 1])
                x = x + layer.mlp(layer.mlp_norm(x))
                inputs, expected = [attended[index - 1].view(heads), streams[index - 1]], [x]
                if index < n_layers:
                    inputs += [cos, sin]
                    expected += qkv(decoder, index, x, cos, sin)
                last = x
            else:
                inputs = [last[:, -1:]]
                expected = [decoder.lm_head(decoder.norm(last[:, -1:]))]
        shapes, count = cut_delegate(quantized_bundle.base_program, index, tmp_path / "cut.pte")
        assert count == len(expected) and len(shapes) == len(inputs)
        program = StockProgram(tmp_path / "cut.pte", quantized_bundle.foundation)
        outputs = program.run_all("forward", *[tensor.contiguous() for tensor in inputs])
        for place, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            assert output.shape == wanted.shape
            # Against what the delegate adds: the residual stream alone would hide a wrong MLP.
            scale = (
                (wanted - streams[index - 1]).std() if place == 0 and 1 <= index <= n_layers else wanted.std()
            )
            worst[f"delegate {index}, output {place}"] = float((output - wanted).pow(2).mean().sqrt() / scale)
    # Root mean square difference, relative: steps of 1/255 of a row's range in some activations.
    assert max(worst.values()) < 0.02, sorted(worst.items(), key=lambda item: -item[1])[:5]
