"""Makes the models that runtime.py measures: the same weights for bedplate, llama.cpp and OpenVINO, and adapters.

    python benchmarks/models.py MODEL.gguf FOLDER [--openvino PYTHON] [--before PYTHON] [--only NAME]

`135M` is SmolLM2 (MODEL.gguf). `0.6B` and `1B` have the dimensions of Qwen3-0.6B and Llama-3.2-1B, random weights and
the tokenizer of SmolLM2. PYTHON are those of environments with `optimum-intel[openvino]`, and with bedplate of commit
c8bd865. What is there already is not made again. FOLDER then holds, for each name:

    hf/             the weights in safetensors (float32; the random ones bfloat16)
    adapters/0 … 7  LoRA adapters of PEFT: rank 16, all seven linears
    bundle/         default recipe; adapter 0 in float32 as `float32`, all eight in 8 bits as `a0` … `a7`
    hqq/            with `--method hqq` (of `135M` alone)
    before/         default recipe, built by c8bd865
    q4_0.gguf       for llama.cpp. All systems have the head in 8 bits
    openvino/       for OpenVINO GenAI: 4 bits, symmetric, groups of 32
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig

import bedplate

ADAPTERS = 8
HEAD = "lm_head.weight"
MOST_BYTES = 3 << 30  # of a file of random weights
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
    },
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 49152,
    },
}
NAMES = ("135M", *SHAPES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--openvino", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", choices=NAMES)
    options = parser.parse_args()
    for name in [options.only] if options.only else NAMES:
        folder = options.folder.absolute() / name
        folder.mkdir(parents=True, exist_ok=True)
        make_bundles(name, folder, options.model)
        if options.before:
            make(folder / "before", build_before, options.before.absolute(), folder / "hf")
        if options.openvino:
            make(folder / "openvino", convert, options.openvino.absolute(), folder / "hf")


def make_bundles(name: str, folder: Path, source: Path) -> None:
    hf = folder / "hf"
    if name in SHAPES:
        make(hf, save_random, llama_config(**SHAPES[name]), source)
    else:
        make(hf, save_hugging_face, source)
        make(folder / "hqq", build_hqq, hf)
    make(folder / "adapters", save_adapters, hf, ADAPTERS)
    make(folder / "bundle", build_with_adapters, hf, folder / "adapters")
    make(folder / "q4_0.gguf", write_q4_0, hf, source)


def make(out: Path, work: Callable[..., object], *words: object) -> None:
    """Call `work` with these words and a path. The path becomes `out` when it is complete."""
    if out.exists():
        return
    print(out, file=sys.stderr, flush=True)
    part = out.with_name(f"part-{out.name}")
    if part.is_dir():
        shutil.rmtree(part)
    work(*words, part)
    part.rename(out)


def llama_config(**settings: Any) -> LlamaConfig:
    """Of a model whose head is its embedding, and whose bos and eos are those of SmolLM2."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    rest: dict[str, Any] = {"max_position_embeddings": 8192, "rope_parameters": rope}
    return LlamaConfig(**{**rest, **settings}, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)


def save_hugging_face(source: Path, folder: Path) -> None:
    """The model of a GGUF as a Hugging Face folder of float32."""
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    save(model, config, folder)
    save_tokenizer(source, folder)


def save_random(config: PreTrainedConfig, tokenizer: Path, folder: Path) -> None:
    """A model of random bfloat16 weights, with the tokenizer of another, a GGUF or a Hugging Face folder."""
    save_random_weights(config, folder)
    save_tokenizer(tokenizer, folder)


def save_random_weights(config: PreTrainedConfig, folder: Path, *, twice: bool = False) -> None:
    """Random bfloat16 weights, of which no more than a file is in memory.

    twice: a tied head is in the files beside the embedding, as some published models have it.
    """
    model = without_values(config)
    shapes = {
        name: value.shape
        for name, value in model.state_dict().items()
        if name != HEAD or twice or not config.tie_word_embeddings
    }
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    parts = list(split(shapes))
    files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    tied = {HEAD: "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    for file, names in zip(files, parts, strict=True):
        weights = {name: random_tensor(tied.get(name, name), shapes[name]) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_values(config: PreTrainedConfig) -> Any:
    """The model of names and shapes alone."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def split(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names of bfloat16 tensors that are in one file."""
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if names and held + 2 * shape.numel() > MOST_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += 2 * shape.numel()
    yield names


def random_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)  # a norm
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def save_tokenizer(source: Path, folder: Path) -> None:
    if source.is_file():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)


def save(model: Any, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != HEAD}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))


def save_adapters(model: Path, count: int, folder: Path) -> None:
    """Random adapters of rank 16 on all linears but the head, in the folders 0, 1, … of `folder`."""
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = without_values(AutoConfig.from_pretrained(model))
    with torch.device("meta"):
        adapted = get_peft_model(base, settings)
    shapes = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.empty(value.shape).normal_(0, 0.02, generator=generator)
            for name, value in shapes.items()
        }
        adapted.peft_config["default"].save_pretrained(folder / str(seed))
        save_file(weights, folder / str(seed) / "adapter_model.safetensors", metadata={"format": "pt"})


def build_hqq(model: Path, out: Path) -> None:
    bedplate.build(model, out, method="hqq", programs=False)


def build_with_adapters(model: Path, adapters: Path, out: Path) -> None:
    bundle = bedplate.build(model, out, programs=False)
    bundle.add(adapters / "0", name="float32", quantize="none", programs=False)
    eight = {f"a{seed}": adapters / str(seed) for seed in range(ADAPTERS)}
    bundle.add_all(eight, quantize="8w", programs=False)


def build_before(python: Path, model: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as units:
        run([python.with_name("bedplate"), "build", model, "-o", out, "--unit-cache", units])


def convert(python: Path, model: Path, out: Path) -> None:
    run(openvino_command(python, model, out))


def openvino_command(python: Path, model: Path, out: Path) -> list[object]:
    int4 = ["--weight-format", "int4", "--sym", "--group-size", "32", "--ratio", "1.0"]
    task = ["--task", "text-generation-with-past"]
    return [python.with_name("optimum-cli"), "export", "openvino", "--model", model, *task, *int4, out]


def run(command: list[object]) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=environment)


def write_q4_0(model: Path, tokenizer: Path, out: Path) -> None:
    """The linears of a Hugging Face folder in Q4_0, the embedding (which is the head) in Q8_0, as a GGUF.

    tokenizer: a GGUF that has the tokenizer.
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    add_dimensions(writer, config)
    add_tokenizer(writer, gguf.GGUFReader(tokenizer), config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    types = gguf.GGMLQuantizationType
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 – it is no dict
            value = weights.get_tensor(name).float()
            linear = name.split(".")[-2]
            if linear in heads:  # llama.cpp's rotation turns neighbours, Hugging Face's the halves of a head
                value = value.view(heads[linear], 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
            kind = types.F32 if value.dim() == 1 else types.Q8_0 if linear == "embed_tokens" else types.Q4_0
            data = gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_dimensions(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: gguf.GGUFWriter, source: gguf.GGUFReader, vocab: int) -> None:
    """The tokenizer of another GGUF, filled up to `vocab` tokens with some that no text has."""
    for name, field in source.fields.items():
        if not name.startswith("tokenizer."):
            continue
        value, kind = field.contents(), field.types[0]
        if name == "tokenizer.ggml.tokens":
            value = value + [f"[PAD{token}]" for token in range(len(value), vocab)]
        if name == "tokenizer.ggml.token_type":
            value = value + [int(gguf.TokenType.UNUSED)] * (vocab - len(value))
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type)


if __name__ == "__main__":
    main()
