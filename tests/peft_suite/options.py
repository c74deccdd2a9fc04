"""The LoRA options that PEFT's own tests try, read from the tests in its source distribution."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.config

# Names of a Llama's modules; others in PEFT's tests are those of its toys.
LINEARS = ("q_proj", "v_proj", "up_proj", "down_proj", "k_proj", "gate_proj", "o_proj")
LLAMA_NAMES = frozenset(
    {
        *LINEARS,
        *("model", "layers", "self_attn", "mlp", "embed_tokens", "lm_head", "weight", "bias"),
        *("norm", "input_layernorm", "post_attention_layernorm"),
    }
)
# Fields that name modules, by themselves or as the keys of an object.
NAMING = frozenset(
    {
        *("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"),
        *("target_parameters", "trainable_token_indices", "use_bdlora"),
    }
)


def download_tests(folder: Path) -> Path:
    """The tests of the installed PEFT, downloaded into `folder` unless they are there."""
    tests = folder / peft.__version__
    if tests.is_dir():
        return tests
    with tempfile.TemporaryDirectory(dir=folder) as work:
        options = ["--no-deps", "--no-binary", "peft", "--no-build-isolation", "--dest", work]
        command = [sys.executable, "-m", "pip", "download", f"peft=={peft.__version__}", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"PEFT's tests come from PyPI, once; then from {folder}\n{done.stderr}"
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(work, filter="data")
        (found,) = Path(work).glob("peft-*/tests")
        try:
            found.rename(tests)
        except OSError:  # another process was first
            assert tests.is_dir()
    return tests


def lora_options(tests: Path) -> tuple[list[dict[str, Any]], int]:
    """Keywords of each LoraConfig there, once each, and how many hold values that only a run of the test has.

    Looked for: `LoraConfig(…)`, and tuples of LoraConfig and a dict, which are PEFT's matrices.
    """
    found: dict[str, dict[str, Any]] = {}
    unknown = 0
    for file in sorted(tests.glob("*.py")):
        for keywords in _keywords(ast.parse(file.read_text("utf-8"))):
            try:
                options = _on_llama({name: _value(value) for name, value in keywords.items()})
            except (ValueError, TypeError):
                unknown += 1
            else:
                found.setdefault(repr(sorted(options.items())), options)
    return list(found.values()), unknown


def _keywords(tree: ast.AST) -> Iterator[dict[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "LoraConfig":
            yield {str(keyword.arg): keyword.value for keyword in node.keywords}
        elif isinstance(node, ast.Tuple) and any(
            isinstance(part, ast.Name) and part.id == "LoraConfig" for part in node.elts
        ):
            for options in (part for part in node.elts if isinstance(part, ast.Dict)):
                pairs = zip(options.keys, options.values, strict=True)
                yield {ast.unparse(key).strip("'"): value for key, value in pairs if key}


def _value(node: ast.expr) -> Any:
    """What an expression stands for: a literal, a task of PEFT's, or one of LoRA's inner configs.

    ValueError: only a run of the test knows.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        inner = getattr(peft.tuners.lora.config, node.func.id, None)
        if dataclasses.is_dataclass(inner):
            return inner(**{str(keyword.arg): _value(keyword.value) for keyword in node.keywords})  # type: ignore[operator]
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "TaskType":
        return str(getattr(peft.TaskType, node.attr).value)
    return ast.literal_eval(node)


def _on_llama(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with modules of a Llama in place of those of PEFT's toys."""
    names: dict[str, str] = {}

    def one(found: re.Match[str]) -> str:
        name = found[0]
        if name in LLAMA_NAMES:
            return name
        if name not in names:
            kinds = (("emb", "embed_tokens"), ("wte", "embed_tokens"), ("head", "lm_head"), ("norm", "norm"))
            given = [there for kind, there in kinds if kind in name.lower()]
            names[name] = given[0] if given else LINEARS[len(names) % len(LINEARS)]
        return names[name]

    def rename(value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            return re.sub(r"(?<!\\)\b[A-Za-z_]\w*", one, value)
        if isinstance(value, list | tuple | set):
            return [rename(part) for part in value]
        if isinstance(value, dict):
            return {rename(key): part for key, part in value.items()}
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **{name: rename(field) for name, field in fields.items()})  # type: ignore[type-var]
        return value

    return {name: rename(value) if name in NAMING else value for name, value in options.items()}
