"""Configs in which much is chosen at random, written as by hand: the logits of transformers, or a refusal."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FULL, SLIDING, make_toy, quiet, randomize, toy_fields
from rope_sections import TYPES, longrope
from torch import Tensor
from transformers import AutoModelForCausalLM

from bedplate.errors import BedplateError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.families import FAMILIES
from bedplate.model.load import float_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = [5, 30, 7, 7, 21, 0, 42, 1, 91, 60, 3, 3]
EXAMPLES = 20  # of each family; of 10,000 in all none was wrong
LAYERS = 3
EPS, FLAG, FACTOR, CAP = [1e-3, 0.2], [True, False], [0.3, 2, 5], [1.5, 4, None]
# What a field may be, beside what the toy has and beside being left out.
POOLS: dict[str, list[Any]] = {
    "num_key_value_heads": [1, 2, 4, None],
    "head_dim": [8, 16, 32, None],
    "hidden_act": ["silu", "gelu_pytorch_tanh", "relu2", "gelu"],
    "hidden_activation": ["silu", "gelu_pytorch_tanh", "relu2"],
    "rms_norm_eps": EPS,
    "layer_norm_eps": EPS,
    "norm_eps": EPS,
    "attention_bias": FLAG,
    "attention_out_bias": FLAG,
    "mlp_bias": FLAG,
    "use_qkv_bias": FLAG,
    "use_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "use_sliding_window": FLAG,
    "use_parallel_residual": FLAG,
    "sliding_window": [2, 3, 5, 64, None],
    "sliding_window_pattern": [1, 2, 3],
    "max_window_layers": [0, 1, 2, 9],
    "no_rope_layer_interval": [1, 2, 3],
    "no_rope_layers": [[1, 0, 1], [0, 0, 0], [1, 1, 1, 0], None],
    "embedding_multiplier": FACTOR,
    "residual_multiplier": FACTOR,
    "attention_multiplier": FACTOR,
    "logits_scaling": FACTOR,
    "logit_scale": FACTOR,
    "query_pre_attn_scalar": FACTOR,
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "position_embedding_type": ["rope", "nope", None],
    "max_position_embeddings": [12, 64, 100],
    "rope_theta": [100.0, 50000.0],
    "rope_local_base_freq": [50.0],
    "partial_rotary_factor": [0.25, 0.5, 0.7, 1.0],
    "original_max_position_embeddings": [6, 40],
}
OLDER = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings")


def section(draw: random.Random, head_dim: int) -> dict[str, Any]:
    kind = draw.choice([*TYPES, "default"])
    chosen = dict(draw.choice(TYPES[kind]))
    if kind == "longrope":
        chosen = {**longrope(draw.choice([head_dim // 2, head_dim // 4]), draw.choice([6, 40]))}
        if draw.random() < 0.5:
            chosen["factor"] = 3.0
    if "original_max_position_embeddings" in chosen:
        chosen["original_max_position_embeddings"] = draw.choice([6, 40])
    if draw.random() < 0.3:
        chosen["partial_rotary_factor"] = draw.choice([0.25, 0.5, 1.0])
    if draw.random() < 0.7:
        chosen["rope_theta"] = draw.choice([100.0, 10000.0])
    if draw.random() < 0.3:
        chosen["type"] = chosen.pop("rope_type")
    return chosen


def mixture(family: str, draw: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = {**toy_fields(family), "num_hidden_layers": LAYERS, "model_type": family}
    known = {field.name for field in dataclasses.fields(type(make_toy(family)))}
    if "layer_types" in known:
        kinds = [
            draw.choice([FULL, SLIDING, FULL if family == "granitemoehybrid" else SLIDING])
            for _ in range(LAYERS)
        ]
        config["layer_types"] = draw.choice([kinds, kinds, [FULL] * LAYERS, None])
    for name in (
        name for name in POOLS if name in known or name in OLDER or name == "sliding_window_pattern"
    ):
        if name in OLDER and draw.random() < 0.7:
            continue
        if draw.random() < 0.5:
            config[name] = draw.choice(POOLS[name])
        elif draw.random() < 0.2 and name != "num_key_value_heads":
            config.pop(name, None)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name in ("rope_parameters", "rope_scaling"):
        if draw.random() < (0.5 if name == "rope_parameters" else 0.25):
            config[name] = section(draw, head_dim)
            if family in ("gemma3_text", "olmo3") and name == "rope_parameters":
                config[name] = {FULL: section(draw, head_dim), SLIDING: section(draw, head_dim)}
        elif draw.random() < 0.5:
            config.pop(name, None)
    if family == "ministral3" and config.get("rope_parameters"):
        config["rope_parameters"].setdefault("llama_4_scaling_beta", 0.5)
    return config


def compare(family: str, seed: int, folder: Path) -> str | None:
    """Whether a mixture was `refused`, `failed` in transformers, or `taken`. AssertionError: other logits."""
    draw = random.Random(f"{family} {seed}")
    config = mixture(family, draw)
    try:
        expected = theirs(family, config, folder, seed)
    except Exception:  # whatever it says of a config that it does not like
        return "failed"
    try:
        checkpoint = open_checkpoint(folder)
    except BedplateError as error:
        assert "tensor" not in error.what, f"{family} {seed}: {error}"
        return "refused"
    length = min(len(TOKENS), checkpoint.spec.max_positions)
    decoder = float_decoder(checkpoint, max_context=length)
    with torch.no_grad():
        found = decoder(torch.tensor([TOKENS[:length]]), torch.tensor([0]), torch.zeros(length))[0]
    difference = float((found - expected[:length]).abs().max())
    assert difference < 1e-4 * max(1.0, float(expected.abs().max())), f"{family} {seed}: {difference}"
    return "taken"


def theirs(family: str, config: dict[str, Any], folder: Path, seed: int) -> Tensor:
    """Logits of a random model of this config, which is saved with the config as it is."""
    kind = type(make_toy(family))
    read = quiet(lambda: kind(**json.loads(json.dumps(config))))
    model = quiet(lambda: AutoModelForCausalLM.from_config(read, dtype=torch.float32)).eval()
    randomize(model, seed)
    quiet(lambda: model.save_pretrained(folder))
    (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_what_transformers_makes_of_it(family: str, tmp_path: Path) -> None:
    results = [compare(family, seed, tmp_path) for seed in range(EXAMPLES)]
    assert results.count("taken") >= 2, results
