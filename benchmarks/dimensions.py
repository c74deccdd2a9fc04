"""Models of the dimensions that people use, with random weights: build, add, and decode beside llama.cpp.

    python benchmarks/dimensions.py FOLDER --peers PYTHON --llama-cpp SOURCES [--rounds N] [--only NAME] [--keep]

PYTHON is that of an environment with `llama-cpp-python`. SOURCES are llama.cpp's: its converter makes the GGUF, of the
same weights, with linears in Q4_0 and a head in Q8_0. FOLDER takes up to 20 GB. A model is removed from it when it was
measured, unless it is to be kept. Prints a Markdown table, and writes all figures under the machine's name into
dimensions.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import make, save_adapters, save_random_weights, without_values
from processes import measured
from runtime import BUILD, Figures, best, finish, machine, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig

HERE = Path(__file__).parent
WINDOW, TURNS = 16, 3  # as in runtime.py
SPARE_MB = 1000  # that a build may take beside the largest tensor
FIRST_BYTE = 256  # the id of the token of byte 0

# As published in config.json.
GEMMA_3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
LONG_FACTORS = [
    *(1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649),
    *(2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845),
    *(5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158),
    *(11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105),
    *(25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71),
    *(32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
]
MODELS: dict[str, dict[str, Any]] = {
    "Gemma 3 270M": {
        **GEMMA_3,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
    },
    "Gemma 3 1B": {
        **GEMMA_3,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
    "Phi-4-mini": {
        "model_type": "phi3",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": LONG_FACTORS,
            "short_factor": [1.0] * len(LONG_FACTORS),
        },
        "sliding_window": 262144,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "pad_token_id": 199999,
        "tie_word_embeddings": True,
    },
}
HEAD_IN_FILES = {"Qwen3-0.6B"}  # though it is the embedding


@dataclass(frozen=True)
class Tools:
    """peers: a Python with `llama-cpp-python`. llama_cpp: sources of llama.cpp."""

    peers: Path
    llama_cpp: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    tools = Tools(peers=options.peers.absolute(), llama_cpp=options.llama_cpp.absolute())
    for name in [options.only] if options.only else MODELS:
        folder = options.folder.absolute() / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        keep(name, measure(name, folder, tools, options.rounds))
        if not options.keep:
            shutil.rmtree(folder)
    print(table(results()[machine()]))


def measure(name: str, folder: Path, tools: Tools, rounds: int) -> Figures:
    config = AutoConfig.for_model(**MODELS[name])
    make(folder / "hf", save_model, config, name in HEAD_IN_FILES)
    make(folder / "q4_0.gguf", write_q4_0, tools, folder / "hf")
    make(folder / "adapters", save_adapters, folder / "hf", 1)
    found = sizes(config)
    kinds: dict[str, list[object]] = {"bare": ["--no-programs"], "full": ["--unit-cache", folder / "units"]}
    for kind, words in kinds.items():
        print(f"{name}: build, {kind}", file=sys.stderr, flush=True)
        bundle = folder / kind
        for step, command in {
            "build": ("build", folder / "hf", "-o", bundle, "--force"),
            "add": ("add", bundle, folder / "adapters" / "0"),
        }.items():
            took = measured([sys.executable, "-W", "ignore", "-c", BUILD, *command, *words], folder)
            found |= {f"{step}_{kind}_{figure}": value for figure, value in took.items()}
    speeds: list[Figures] = []
    for number in range(rounds):
        print(f"{name}: speeds, round {number + 1}", file=sys.stderr, flush=True)
        for system, speed in one_round(folder, tools.peers):
            speeds.append({f"{system}_{figure}": value for figure, value in speed.items()})
    return found | best(speeds)


def one_round(folder: Path, peers: Path) -> list[tuple[str, Figures]]:
    ours = run(Path(sys.executable), "run_bedplate", "base", WINDOW, TURNS, folder / "bare")
    theirs = run(peers, "run_llama_cpp", "speeds", WINDOW, TURNS, folder / "q4_0.gguf")
    return [("ours", ours), ("theirs", theirs)]


def sizes(config: PreTrainedConfig) -> Figures:
    """Numbers of the model in millions, and bytes of its largest tensor, which is stored as bfloat16, in MB."""
    parameters = list(without_values(config).parameters())
    return {
        "millions": sum(one.numel() for one in parameters) / 1e6,
        "largest_mb": 2 * max(one.numel() for one in parameters) / 1e6,
    }


def save_model(config: PreTrainedConfig, twice: bool, folder: Path) -> None:
    save_random_weights(config, folder, twice=twice)
    byte_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))


def byte_tokenizer(size: int) -> Tokenizer:
    """Each byte is a token. The other tokens come in no text."""
    tokens = [f"<unused{number}>" for number in range(size)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens[FIRST_BYTE : FIRST_BYTE + len(letters)] = letters
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_q4_0(tools: Tools, model: Path, out: Path) -> None:
    whole = out.with_name("bf16.gguf")
    finish([sys.executable, "-W", "ignore", HERE / "converter.py", tools.llama_cpp, model, whole])
    finish([tools.peers, HERE / "systems" / "quantize_llama_cpp.py", whole, out])
    whole.unlink()


def results() -> dict[str, dict[str, Any]]:
    """Figures of each model by machine and name, and when they were measured."""
    file = HERE / "dimensions.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def keep(name: str, figures: Figures) -> None:
    found = results()
    mine = found.setdefault(machine(), {})
    mine[name] = {"date": time.strftime("%Y-%m-%d"), **figures}
    found[machine()] = {one: mine[one] for one in MODELS if one in mine}
    (HERE / "dimensions.json").write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, Any]) -> str:
    def took(step: str) -> Callable[[Figures], str]:
        return lambda f: f"{f[f'{step}_seconds']:.3g} s, {f[f'{step}_peak_mb']:,.0f} MB"

    def beyond(step: str) -> Callable[[Figures], str]:
        def cell(f: Figures) -> str:
            value = f[f"{step}_peak_mb"] - f["largest_mb"]
            return f"{value:,.0f}" if value <= SPARE_MB else f"**{value:,.0f}**"

        return cell

    def ratio(figure: str) -> Callable[[Figures], str]:
        def cell(f: Figures) -> str:
            ours, theirs = f[f"ours_{figure}"], f[f"theirs_{figure}"]
            return f"{ours / theirs:.3g} ({ours:,.4g} : {theirs:,.4g})"

        return cell

    rows: dict[str, Callable[[Figures], str]] = {
        "parameters, millions": lambda f: f"{f['millions']:,.0f}",
        "largest tensor, MB in bfloat16": lambda f: f"{f['largest_mb']:,.0f}",
        "`build --no-programs`": took("build_bare"),
        "peak beyond the largest tensor, MB": beyond("build_bare"),
        "of the peak, anonymous, MB": lambda f: f"{f['build_bare_anonymous_mb']:,.0f}",
        "`build`, nothing cached": took("build_full"),
        "peak beyond the largest tensor, MB, with programs": beyond("build_full"),
        "of that peak, anonymous, MB": lambda f: f"{f['build_full_anonymous_mb']:,.0f}",
        "`add --no-programs`, r16 on all linears": took("add_bare"),
        "`add`, nothing cached": took("add_full"),
        "decode ÷ llama.cpp": ratio("decode"),
        "decode from position 800 ÷ llama.cpp": ratio("decode_800"),
        "prefill of 241 tokens ÷ llama.cpp": ratio("prefill"),
    }
    dates = sorted({f["date"] for f in found.values()})
    lines = [
        f"{' and '.join(dates)}, {machine()}. What misses its goal is bold.",
        "",
        f"| | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    lines += [f"| {label} | {' | '.join(map(cell, found.values()))} |" for label, cell in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
