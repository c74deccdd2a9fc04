"""What it takes to build and to add: bedplate beside ExecuTorch's `export_llm` and OpenVINO's conversion, in one run.

    python benchmarks/build.py MODEL.gguf [--openvino PYTHON] [--skip-stock]

PYTHON is that of an environment with `optimum-intel[openvino]`. Every step is a process of its own, timed whole, with
its peak of resident memory. Prints a Markdown table and writes build.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import SHAPES, llama_config, openvino_command, save_adapters, save_hugging_face, save_random
from processes import measured
from transformers import AutoModelForCausalLM, LlamaConfig

SMOLLM2 = {"layers": 30, "dim": 576, "kv_heads": 3, "heads": 9}
# ExecuTorch's own names of the weights, after Meta's.
META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--openvino", type=Path)
    parser.add_argument("--skip-stock", action="store_true", help="The stock export takes ten minutes.")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}

    def measure(name: str, command: Sequence[object]) -> None:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows[name] = measured(command, folder)
        print(f"  {rows[name]['seconds']:.1f} s, {rows[name]['peak_mb']:.0f} MB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_hugging_face(options.model, folder / "smollm2")
        save_adapters(folder / "smollm2", 3, folder / "adapters")
        adapters = [folder / "adapters" / str(number) for number in range(3)]
        measure_smollm2(measure, options.model.absolute(), folder, adapters)
        measure_depth(measure, folder)
        measure_llama_1b(measure, folder)
        if options.openvino:
            measure(
                "OpenVINO: optimum-cli export, int4 sym g32",
                openvino_command(options.openvino.absolute(), folder / "smollm2", folder / "openvino"),
            )
        if not options.skip_stock:
            measure("ExecuTorch: export_llm, 8da4w g32", stock_command(folder))
    result = {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    (Path(__file__).parent / "build.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['date']}, {result['machine']}\n\n| | s | peak MB |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['peak_mb']:,.0f} |")


def measure_smollm2(measure: Any, model: Path, folder: Path, adapters: list[Path]) -> None:
    units = ["--unit-cache", folder / "units"]
    measure("bedplate build, nothing cached", bedplate("build", model, "-o", folder / "a", *units))
    measure("bedplate build, units cached", bedplate("build", model, "-o", folder / "b", *units))
    other = ["build", folder / "smollm2", "-o", folder / "c", *units]
    measure("bedplate build, units cached, from float32 safetensors", bedplate(*other))
    one, two, three = adapters
    measure("bedplate add, r16 on seven linears, nothing cached", bedplate("add", folder / "a", one, *units))
    measure("bedplate add, the same, units cached", bedplate("add", folder / "a", two, *units))
    measure("bedplate add, three at once", bedplate("add", folder / "b", one, two, three, *units))
    measure(
        "bedplate build --no-programs, from float32 safetensors",
        bedplate("build", folder / "smollm2", "-o", folder / "d", "--no-programs"),
    )
    measure("bedplate add to it, r16 on seven linears", bedplate("add", folder / "d", one))
    eight = ["--quantize", "8w", *units]
    measure("bedplate add, 8 bits, nothing cached", bedplate("add", folder / "c", one, *eight))
    measure("bedplate add, 8 bits, units cached", bedplate("add", folder / "c", two, *eight))


def measure_depth(measure: Any, folder: Path) -> None:
    for depth in (30, 60):
        model = folder / f"depth{depth}"
        config = LlamaConfig.from_pretrained(folder / "smollm2", num_hidden_layers=depth)
        save_random(config, folder / "smollm2", model)
        for state in ("nothing", "units"):
            out = folder / f"depth{depth}.{state}"
            command = ["build", model, "-o", out, "--unit-cache", folder / f"units{depth}"]
            measure(f"bedplate build, {depth} layers of random weights, {state} cached", bedplate(*command))


def measure_llama_1b(measure: Any, folder: Path) -> None:
    config = llama_config(**{**SHAPES["1B"], "vocab_size": 128256})
    save_random(config, folder / "smollm2", folder / "llama")
    for state in ("nothing", "units"):
        out = folder / f"llama.{state}"
        command = ["build", folder / "llama", "-o", out, "--unit-cache", folder / "llama-units"]
        measure(f"bedplate build, Llama-3.2-1B's dimensions in bf16, {state} cached", bedplate(*command))


def bedplate(*words: object) -> list[object]:
    return [Path(sys.executable).with_name("bedplate"), *words]


def stock_command(folder: Path) -> list[object]:
    """ExecuTorch's exporter over the same weights, with the settings of its own SmolLM2 recipe."""
    weights = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=torch.float32).state_dict()
    checkpoint = {meta_name(name): meta_layout(name, value) for name, value in weights.items()}
    torch.save(checkpoint, folder / "meta.pth")
    config: Any = LlamaConfig.from_pretrained(folder / "smollm2")
    params = {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "use_scaled_rope": False,
        "vocab_size": config.vocab_size,
    }
    (folder / "params.json").write_text(json.dumps(params))
    settings = {
        "base.model_class": "smollm2",
        "base.checkpoint": folder / "meta.pth",
        "base.params": folder / "params.json",
        "model.dtype_override": "fp32",
        "model.use_kv_cache": True,
        "model.use_sdpa_with_kv_cache": True,
        "export.max_seq_length": 2048,
        "export.max_context_length": 2048,
        "export.output_dir": folder,
        "export.output_name": "stock.pte",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "backend.xnnpack.enabled": True,
        "backend.xnnpack.extended_ops": True,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-W", "ignore", "-m", "executorch.extension.llm.export.export_llm", *words]


def meta_name(name: str) -> str:
    path = name.removeprefix("model.").removesuffix(".weight")
    for theirs, ours in META_NAMES.items():
        path = path.replace(theirs, ours)
    return {"lm_head": "output"}.get(path, path) + ".weight"


def meta_layout(name: str, value: torch.Tensor) -> torch.Tensor:
    """Meta's q and k interleave the two halves of each head's rows."""
    heads = {"q_proj": SMOLLM2["heads"], "k_proj": SMOLLM2["kv_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)


def machine() -> str:
    name = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
