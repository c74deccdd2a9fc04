"""Bundles of every recipe and shape, without programs: what they compute against transformers + PEFT where they hold
floats, and against the dequantized model where they hold codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eager import eager_decoder, eager_logits
from grouped import grouped
from toy import reference, save_adapter, save_toy_model, toy_config

import bedplate
from bedplate import Bundle, Engine
from bedplate.quantize.options import AdapterScheme

TOKENS = [int(token) for token in np.random.default_rng(0).integers(2, 320, 90)]
TEXTS = [TOKENS[first : first + 6] for first in range(0, len(TOKENS), 6)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 24, "num_attention_heads": 8},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 64},
    "odd": {
        "hidden_size": 72,
        "intermediate_size": 50,
        "head_dim": 10,
        "vocab_size": 321,
        "attention_bias": True,
    },
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 5},
    "q": {"rank": 3, "targets": ["q_proj"]},
    "v and gate": {"rank": 18, "targets": ["v_proj", "gate_proj"]},
}
# Names of recipes and shapes together: each shape at least once in floats and once in codes.
MIXED = {
    "layers.*.self_attn.q_proj": "8da8w",
    "layers.*.self_attn.o_proj": "none",
    "layers.*.mlp.up_proj": "none",
    "layers.*.mlp.down_proj": "8da8w",
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8da4w": ("biases", {}),
    "8da4w, embedding of 4 bits": ("llama3", {"embedding": "4"}),
    "8da4w, embedding and head of floats": ("untied", {"embedding": "float", "head": "none"}),
    "8da4w, head of 4 bits": ("untied", {"head": "8da4w", "method": "plain"}),
    "8da4w, groups of 64": (
        "one kv head",
        {"group_size": 64, "overrides": {"layers.*.mlp.down_proj": "8da8w"}},
    ),
    "8da4w, a scale a row": ("odd", {"group_size": 0, "method": "hqq"}),
    "8da4w, plain": ("biases", {"method": "plain"}),
    "8da4w, hqq": ("one kv head", {"method": "hqq"}),
    "8da8w": ("odd", {"quantize": "8da8w"}),
    "8da8w, tied": ("plain", {"quantize": "8da8w"}),
    "recovery": ("llama3", {"recovery_rank": 4, "method": "plain"}),
    "recovery beside offsets": ("biases", {"recovery_rank": 7}),
    "mixed": ("biases", {"overrides": MIXED}),
    "mixed with recovery": ("untied", {"overrides": MIXED, "recovery_rank": 3}),
}

Model = Callable[[str], Path]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Model:
    made: dict[str, Path] = {}

    def model(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("model")
            save_toy_model(made[shape], toy_config(num_hidden_layers=2, **SHAPES[shape]), seed=len(shape))
        return made[shape]

    return model


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory: pytest.TempPathFactory, model_of: Model) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def adapter(shape: str, name: str) -> Path:
        if (shape, name) not in made:
            folder = tmp_path_factory.mktemp("adapter")
            made[shape, name] = save_adapter(folder, model_of(shape), seed=len(name), **ADAPTERS[name])
        return made[shape, name]

    return adapter


def build(
    model: Path, folder: Path, adapters: dict[str, tuple[Path, AdapterScheme]], **options: Any
) -> Bundle:
    bundle = bedplate.build(model, folder / "toy.bundle", programs=False, max_context=128, **options)
    for name, (source, scheme) in adapters.items():
        bundle.add(source, name=name, quantize=scheme)
    return bundle


@pytest.mark.parametrize("shape", SHAPES)
def test_floats_are_what_transformers_and_peft_compute(
    shape: str, model_of: Model, adapter_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """In one run, and token by token."""
    folders = {name.replace(" ", "-"): adapter_of(shape, name) for name in ADAPTERS}
    adapters: dict[str, tuple[Path, AdapterScheme]] = {
        name: (folder, "none") for name, folder in folders.items()
    }
    bundle = build(model_of(shape), tmp_path, adapters, quantize="none")
    with Engine(bundle, threads=2, kv="float32") as engine:
        for name in (None, *folders):
            with torch.no_grad():
                model = reference(model_of(shape), None if name is None else folders[name])
                expected = model(torch.tensor([TOKENS])).logits[0].numpy()
            # float32 sums in another order, over logits of some tens.
            assert np.abs(expected).max() > 5
            np.testing.assert_allclose(engine.session(name).logits(TOKENS), expected, rtol=0, atol=1e-4)
            session = engine.session(name)
            stepped = np.stack([session.step([token]) for token in TOKENS])
            np.testing.assert_allclose(stepped, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_what_the_dequantized_model_computes(
    recipe: str, model_of: Model, adapter_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Of short texts most as near as float32 is; in some, an input lies between two codes (see tests/grouped.py), and
    what follows sees a step of 1/254 of the largest of 32 inputs.
    """
    shape, options = RECIPES[recipe]
    schemes: dict[str, tuple[str, AdapterScheme]] = {
        f"{name.replace(' ', '-')}-{scheme}": (name, scheme) for name in ADAPTERS for scheme in ("none", "8w")
    }
    folders = {name: (adapter_of(shape, source), scheme) for name, (source, scheme) in schemes.items()}
    bundle = build(model_of(shape), tmp_path, folders, **options)
    with Engine(bundle, threads=2, kv="float32") as engine:
        for name in (None, *folders):
            folder, scheme = (None, "none") if name is None else folders[name]
            decoder = grouped(eager_decoder(model_of(shape), bundle, folder, scheme))
            expected = np.stack([eager_logits(decoder, text).numpy() for text in TEXTS])
            got = np.stack([engine.session(name).logits(text) for text in TEXTS])
            worst = np.abs(got - expected).max(axis=(1, 2)) / expected.std()
            assert (worst < 3e-5).mean() >= 0.5, (name, sorted(worst))
            assert worst.max() < 0.1, (name, sorted(worst))
