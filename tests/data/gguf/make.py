"""Make the files of this folder: tiny models of transformers, converted by llama.cpp's own converter.

usage: python make.py LLAMA_CPP [OUT]. LLAMA_CPP: a folder with its sources (convert_hf_to_gguf.py, conversion/,
gguf-py/). OUT: the folder to write to, to compare; without it, this one.

Each `.gguf` holds float32 weights. `logits.npz` holds what transformers computes of the model before it was converted,
`configs.json` the fields that its config has.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [
    sys.argv[1],
    f"{sys.argv[1]}/gguf-py",
    str(HERE.parents[1]),
    str(HERE.parents[2] / "benchmarks"),
]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from converter import convert  # noqa: E402
from families import FULL, LLAMA3, SLIDING, YARN, save_toy, theirs  # noqa: E402
from transformers import AutoConfig  # noqa: E402

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [3.0, 4.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 16},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 6,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    ),
    "p3": ("phi3", {"sliding_window": 5, "tie_word_embeddings": True}),
    "p3-longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 6,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "llama_4_scaling_beta": 0.7,
            },
        },
    ),
    "granite": ("granite", {**GRANITE, "attention_bias": True}),
    "granite4": (
        "granitemoehybrid",
        {
            **GRANITE,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 24,
            "layer_types": ["attention"] * 2,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "use_sliding_window": False}),
    "arcee": ("arcee", {"rope_parameters": YARN}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5, "num_hidden_layers": 4}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "cohere2": ("cohere2", {"sliding_window": 5, "logit_scale": 0.3, "num_hidden_layers": 4}),
    "glm4": ("glm4", {"head_dim": 16}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 2}),
    "exaone4-windows": (
        "exaone4",
        {"sliding_window": 5, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
}


def prepare(folder: Path) -> None:
    """What the converter wants of a folder, and toys do not have."""
    if not (folder / "tokenizer.json").exists():  # which is read to count rows of the embedding
        vocabulary = {f"t{number}": number for number in range(TINY["vocab_size"])}
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})
        )
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "cohere2":
        config["rotary_pct"] = 1.0  # which published configs have
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = ["attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, TINY["vocab_size"], 24)]
    logits, configs = {}, {}
    for name, (family, changes) in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work, name)
            save_toy(folder, AutoConfig.for_model(family, **{**TINY, **changes}))
            with torch.no_grad():
                logits[name] = theirs(folder, tokens).numpy()
            configs[name] = json.loads((folder / "config.json").read_text())
            prepare(folder)
            convert(Path(sys.argv[1]), folder, out / f"{name}.gguf", "ALL_F32", eager=True)
    np.savez_compressed(out / "logits.npz", **logits)
    (out / "configs.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
