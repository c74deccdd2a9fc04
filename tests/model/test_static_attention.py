"""Decoders of fixed shapes beside the ordinary ones that they are made of, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import LENGTH, make_toy, save_adapter, save_toy, variants
from numpy.typing import NDArray
from peft import LoraConfig

from bedplate.errors import UnsupportedError
from bedplate.model.adapter import read_adapter
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.decoder import Decoder
from bedplate.model.load import float_decoder, set_parameter
from bedplate.model.lora import LoRALinear
from bedplate.model.static_attention import StaticDecoder
from bedplate.oracle import StaticHost

TOKENS = [int(token) for token in torch.randint(2, 96, (LENGTH,), generator=torch.Generator().manual_seed(1))]
PREFILL = 7


def host(decoder: Decoder, *, decode: int = 1, split_heads: bool = False) -> StaticHost:
    methods = {
        name: StaticDecoder(decoder, length=length, one_row=name == "prefill", split_heads=split_heads)
        for name, length in (("prefill", PREFILL), ("decode", decode))
    }
    windows = methods["decode"].windows

    def call(method: str, inputs: list[NDArray[Any]]) -> Sequence[NDArray[np.float32]]:
        tokens, positions, *rest = map(torch.from_numpy, inputs)
        masks, caches = rest[: len(windows)], rest[len(windows) :]
        row = caches.pop() if method == "prefill" else None
        with torch.no_grad():
            return [output.numpy() for output in methods[method](tokens, positions, masks, caches, row)]

    example = methods["decode"].example()
    return StaticHost(
        call,
        lengths={"prefill": PREFILL, "decode": decode},
        windows=windows,
        caches=[cache.shape for cache in example[3]],
        max_context=decoder.max_context,
    )


def ordinary(decoder: Decoder) -> NDArray[np.float32]:
    decoder.reset_cache()
    with torch.no_grad():
        logits = decoder(torch.tensor([TOKENS]), torch.tensor([0]), torch.zeros(LENGTH))[0]
    return np.asarray(logits.numpy())


def check(decoder: Decoder, **options: Any) -> None:
    expected, static = ordinary(decoder), host(decoder, **options)
    rows = {}
    for start in range(0, 17, PREFILL):  # the last piece is of three tokens
        end = min(start + PREFILL, 17)
        rows[end - 1] = static.run("prefill", TOKENS[start:end], start)[0]
    decode = options.get("decode", 1)
    for start in range(17, LENGTH, decode):
        found = static.run("decode", TOKENS[start : start + decode], start)
        rows |= {start + index: row for index, row in enumerate(found)}
    for position, row in rows.items():
        scale = np.abs(expected[position]).max()
        np.testing.assert_allclose(row, expected[position], rtol=0, atol=1e-5 * scale)


def save(folder: Path, family: str, variant: str = "first") -> Path:
    save_toy(folder, make_toy(family, variant))
    return folder


@pytest.mark.parametrize("variant", variants(), ids="-".join)
def test_a_decoder_of_every_family(variant: tuple[str, str], tmp_path: Path) -> None:
    try:
        checkpoint = open_checkpoint(save(tmp_path, *variant))
    except UnsupportedError:
        pytest.skip("not read")
    decoder = float_decoder(checkpoint, max_context=LENGTH)
    check(decoder)
    check(decoder, split_heads=True, decode=3)


@pytest.mark.parametrize("split_heads", [False, True], ids=["joint", "split"])
def test_adapters_stay(split_heads: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "model", "llama", "biases, untied")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
    checkpoint = open_checkpoint(model)
    adapter = read_adapter(save_adapter(tmp_path / "adapter", model, config), checkpoint.spec)
    base = float_decoder(checkpoint, max_context=LENGTH)
    adapted = float_decoder(checkpoint, max_context=LENGTH, ranks=adapter.ranks)
    for path, a, b in adapter.matrices():
        for half, value in (("lora_a", a), ("lora_b", b)):
            set_parameter(adapted, f"{path}.{half}.weight", torch.from_numpy(value.copy()))
    assert np.abs(ordinary(adapted) - ordinary(base)).max() > 0.1 * np.abs(ordinary(base)).max()
    check(adapted, split_heads=split_heads)


def test_weights_are_the_ordinary_ones() -> None:
    """Not copies; under the same names, but for caches."""
    from small_spec import LINEARS, SPEC

    decoder = Decoder(SPEC, max_context=8, ranks=dict.fromkeys(LINEARS, 2))
    static = StaticDecoder(decoder, length=2, one_row=False, split_heads=True)
    of_ordinary = {name: id(value) for name, value in decoder.named_parameters()}
    assert {name: id(value) for name, value in static.named_parameters()} == of_ordinary
    assert sum(isinstance(module, LoRALinear) for module in static.modules()) == 7 * SPEC.n_layers
    assert not [name for name, _ in static.named_buffers() if name.endswith("_cache")]
    assert decoder.layers[0].k_cache.shape[1] == 8
