"""Every field of a config: with any value of it, the logits of transformers, or a refusal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from toy import save_toy_model, toy_config
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin
from transformers.utils import logging

from bedplate.errors import BedplateError
from bedplate.model.checkpoint import Checkpoint, open_checkpoint
from bedplate.model.load import float_decoder

TOKENS = [5, 300, 7, 7, 211, 0, 42, 1, 99]
# Somebody has looked at these: transformers asks for them, but no logits of a Llama depend on them. A field that is
# not here and makes no difference below is new: find out what it does, and refuse it, compute it, or list it.
WITHOUT_EFFECT = {
    # What the model is called, and what was computed and saved with.
    *("_commit_hash", "name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map"),
    # How it is computed, not what.
    *(
        "attn_implementation",
        "experts_implementation",
        "gradient_checkpointing",
        "pretraining_tp",
        "use_cache",
    ),
    # What is given back beside the logits.
    *("output_attentions", "output_hidden_states", "return_dict"),
    # Training, and classification.
    *("attention_dropout", "initializer_range", "id2label", "label2id", "num_labels", "problem_type"),
    # Generation; bedplate reads these with the tokenizer.
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # Of other families, and of models that a Llama is a part of.
    *("attention_chunk_size", "chunk_size_feed_forward", "is_encoder_decoder", "is_heterogeneous"),
    *("kv_sharing_modes", "mtp_layer_types"),
    *("vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy"),
    # rope_parameters, which is there, wins. tests/model/test_rope_config.py tries this one without it.
    "rope_theta",
}
ANY = (None, True, False, 1, 3, 0.5, "x", [1], {"a": 1})


def fields() -> set[str]:
    """Those of the config class and its bases, those that they take besides, and all others that a model asks for."""
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    for function in (PreTrainedConfig.__post_init__, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    names.add(name)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_toy_model(made, toy_config(num_hidden_layers=2))
    return made


@pytest.fixture(scope="module")
def asked(folder: Path) -> set[str]:
    """The attributes of its config that transformers asks for, also in vain, to load the model and to run it."""
    names: set[str] = set()
    original = LlamaConfig.__getattribute__

    def recorded(self: LlamaConfig, name: str) -> Any:
        names.add(name)
        return original(self, name)

    with mock.patch.object(LlamaConfig, "__getattribute__", recorded):
        theirs(folder)
    assert {"is_causal", "sliding_window", "hidden_size"} <= names
    known = set(vars(PreTrainedConfig)) | set(vars(RotaryEmbeddingConfigMixin)) | set(dir(object))
    return {name for name in names if not name.startswith("_") and name not in known}


def theirs(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]  # type: ignore[no-any-return]


def ours(checkpoint: Checkpoint) -> Tensor:
    decoder = float_decoder(checkpoint, max_context=len(TOKENS))
    with torch.no_grad():
        return decoder(torch.tensor([TOKENS]), torch.tensor([0]), torch.zeros(len(TOKENS)))[0]  # type: ignore[no-any-return]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-3)


def values(name: str, current: Any) -> Iterator[Any]:
    yield from ANY
    if name == "hidden_act":
        yield from ACT2FN
    if type(current) in (int, float):
        yield from (current + 1, current * 2, current / 2)
    if type(current) is int:
        yield current // 2


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers says much about configs that it does not like."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.usefixtures("quiet")
def test_every_field(folder: Path, asked: set[str], tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    base = open_checkpoint(folder)
    expected, mine = theirs(folder), ours(base)
    assert same(expected, mine)
    wrong, without_effect = [], set()
    for name in sorted(fields() | asked):
        effect = False
        for value in values(name, config.get(name)):
            (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
            try:
                checkpoint = open_checkpoint(tmp_path)
            except BedplateError as error:
                effect = True
                assert name in str(error) or "tensor" in str(error), f"{name} = {value!r}: {error}"
                continue
            try:
                right = theirs(tmp_path)
            except Exception:  # whatever it says of a value of the wrong kind
                continue
            effect |= not same(right, expected)
            if not same(right, mine if checkpoint.spec == base.spec else ours(checkpoint)):
                wrong.append((name, value))
        if not effect:
            without_effect.add(name)
    assert not wrong
    assert without_effect == WITHOUT_EFFECT
