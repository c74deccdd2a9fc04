"""Files of llama.cpp's own converter: what is computed from them is what transformers computes of the model before.

The files, and the logits of transformers, are made by `data/gguf/make.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_edit import edited, replaced

from bedplate.errors import BedplateError, CheckpointError, UnsupportedError
from bedplate.model.checkpoint import checked_tensors, open_checkpoint
from bedplate.model.config import spec_from_config
from bedplate.model.gguf_architectures import ARCHITECTURES
from bedplate.model.load import float_decoder

DATA = Path(__file__).parents[1] / "data" / "gguf"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "configs.json").read_text())
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 32, 24)]
# llama.cpp has no name of its own for these.
READ_AS = {"mistral": "llama", "granitemoehybrid": "granite"}


def logits_of(path: Path) -> torch.Tensor:
    decoder = float_decoder(open_checkpoint(path), max_context=64)
    with torch.no_grad():
        return decoder(torch.tensor([TOKENS]), torch.tensor([0]), torch.zeros(len(TOKENS)))[0]


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return dict(np.load(DATA / "logits.npz"))


def test_there_is_a_file_of_each_architecture() -> None:
    found = {path.stem: architecture(path) for path in DATA.glob("*.gguf")}
    assert set(found) == set(CONFIGS) and set(found.values()) == set(ARCHITECTURES)


def architecture(path: Path) -> str:
    return str(gguf.GGUFReader(path).fields["general.architecture"].contents())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_those_of_transformers_before_conversion(name: str, theirs: dict[str, Any]) -> None:
    expected = torch.from_numpy(theirs[name])
    found = logits_of(DATA / f"{name}.gguf")
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_description_is_that_of_the_folder(name: str) -> None:
    ours = asdict(open_checkpoint(DATA / f"{name}.gguf").spec)
    folder = asdict(spec_from_config(CONFIGS[name], where="config.json"))
    kind = CONFIGS[name]["model_type"]
    assert ours.pop("model_type") == READ_AS.get(kind, kind)
    for fields in (ours, folder):
        for field in ("architecture", "model_type"):
            fields.pop(field, None)
    found, expected = flat(ours), flat(folder)
    assert found.keys() == expected.keys()
    for field, value in expected.items():
        close = isinstance(value, float) and found[field] == pytest.approx(value, rel=1e-6)
        assert close or found[field] == value, field  # the format holds numbers as float32


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Numbers by their places, so that they can be compared with a tolerance."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = {str(number): item for number, item in enumerate(value)}.items()
    else:
        return {path: value}
    return {name: leaf for key, item in items for name, leaf in flat(item, f"{path}.{key}").items()}


# Of each architecture what is different from others: without it, logits differ.
TELLING = {
    "llama-3": [("rope_freqs.weight", None)],
    "llama-linear": [("llama.rope.scaling.factor", 2.0)],
    "llama-yarn": [("llama.rope.scaling.factor", 2.0), ("llama.rope.scaling.type", "none")],
    "llama": [("llama.rope.freq_base", 100.0), ("llama.attention.layer_norm_rms_epsilon", 0.1)],
    "qwen2": [("qwen2.rope.freq_base", None)],
    "gemma2": [
        ("gemma2.attention.sliding_window", 3),
        ("gemma2.attention.sliding_window", None),
        ("gemma2.attention.sliding_window_pattern", 1),
        ("gemma2.attention.sliding_window_pattern", [False, True]),
        ("gemma2.attn_logit_softcapping", 1.0),
        ("gemma2.final_logit_softcapping", 1.0),
    ],
    "gemma3": [
        ("gemma3.attention.sliding_window", 3),
        ("gemma3.attention.sliding_window", None),
        ("gemma3.attention.sliding_window_pattern", 2),
        ("gemma3.rope.freq_base", 50.0),
        ("gemma3.rope.freq_base_swa", 50.0),
        ("gemma3.final_logit_softcapping", 1.0),
    ],
    "p3": [("phi3.attention.sliding_window", 0), ("phi3.rope.dimension_count", 4)],
    "p3-longrope": [
        ("phi3.rope.scaling.attn_factor", 2.0),
        ("phi3.rope.scaling.original_context_length", 64),
    ],
    "ministral3": [
        ("mistral3.attention.temperature_scale", 0.1),
        ("mistral3.rope.scaling.yarn_log_multiplier", 0.3),
        ("mistral3.rope.scaling.factor", 8.0),
    ],
    "granite": [
        ("granite.attention.scale", 0.3),
        ("granite.attention.scale", None),
        ("granite.embedding_scale", None),
        ("granite.residual_scale", None),
        ("granite.logit_scale", 1.0),
        ("granite.rope.scaling.finetuned", False),
    ],
    "olmo3": [
        ("olmo2.attention.sliding_window", 64),
        ("olmo2.attention.sliding_window_pattern", [True, False, True, False]),
        ("olmo2.attention.sliding_window_pattern", 2),
        ("olmo2.rope.freq_base_swa", 10.0),
    ],
    "nemotron": [("nemotron.rope.dimension_count", 8)],
    "cohere2": [("cohere2.logit_scale", 1.0), ("cohere2.attention.sliding_window_pattern", 2)],
    "exaone4-windows": [("exaone4.attention.sliding_window", 64)],
}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, field, value) for name, changes in TELLING.items() for field, value in changes],
)
def test_what_a_field_says_is_computed(
    name: str, field: str, value: Any, theirs: dict[str, Any], tmp_path: Path
) -> None:
    edit = replaced(field, value)
    path = edited(DATA / f"{name}.gguf", tmp_path / "a.gguf", edit, without=field)
    expected = torch.from_numpy(theirs[name])
    assert float((logits_of(path) - expected).abs().max()) > 1e-3 * float(expected.abs().max())


REFUSED: list[tuple[str, str, Any]] = [
    ("llama", "llama.rope.scaling.type", "longrope"),
    ("llama", "llama.rope.scaling.type", "something"),
    ("llama", "llama.attention.sliding_window", 5),
    ("llama", "llama.attention.scale", 0.3),
    ("llama", "llama.logit_scale", 0.3),
    ("llama", "llama.expert_count", 2),
    ("llama-yarn", "llama.rope.scaling.yarn_beta_fast", 16.0),
    ("llama-yarn", "llama.rope.scaling.attn_factor", 0.5),
    ("llama-yarn", "llama.rope.scaling.yarn_ext_factor", 0.5),
    ("qwen2", "qwen2.attention.sliding_window", 5),
    ("olmo2", "olmo2.attention.sliding_window_pattern", 3),
    ("qwen3", "qwen3.classifier.output_labels", ["yes", "no"]),
    ("gemma2", "gemma2.rope.freq_base_swa", 100.0),
    ("gemma3", "gemma3.rope.scaling.type", "yarn"),
    ("gemma3", "gemma3.attention.key_length_swa", 8),
    ("p3", "phi3.rope.scaling.type", "yarn"),
    ("granite4", "granite.expert_shared_feed_forward_length", 8),
    ("granite4", "granite.expert_used_count", 2),
    ("stablelm", "stablelm.use_parallel_residual", True),
    ("stablelm", "stablelm.use_parallel_residual", 1),
    ("cohere2", "cohere2.rope.freq_base_swa", 100.0),
    ("glm4", "glm4.rope.dimension_sections", [1, 1, 1, 1]),
    ("glm4", "glm4.nextn_predict_layers", 1),
    ("seed_oss", "seed_oss.a_field_of_tomorrow", 1),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_a_field_that_is_not_computed_is_refused_by_name(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    path = edited(DATA / f"{name}.gguf", tmp_path / "a.gguf", replaced(field, value))
    with pytest.raises(BedplateError, match=field.replace(".", r"\.")) as caught:
        open_checkpoint(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("qwen3", lambda writer: add(writer, "rope_freqs.weight", 8), "rope_freqs.weight has no place"),
        ("llama-yarn", lambda writer: add(writer, "rope_freqs.weight", 4), "rope_freqs.weight has no place"),
        ("llama", lambda writer: add(writer, "rope_freqs.weight", 3), "list of 4 numbers"),
        ("qwen2", lambda writer: add(writer, "output.bias", 32), "output.bias"),
        ("stablelm", lambda writer: add(writer, "blk.0.attn_q_norm.weight", 8), "attn_q_norm"),
        ("gemma", lambda writer: add(writer, "blk.1.attn_q.bias", 32), r"blk\.1\.attn_q\.bias"),
        ("llama", lambda writer: writer.add_uint16("split.count", 3), "one of several files"),
        ("llama", replaced("general.architecture", "granitehybrid"), "architecture 'granitehybrid'"),
    ],
)
def test_what_has_no_place_is_refused(
    name: str, edit: Callable[[gguf.GGUFWriter], None], says: str, tmp_path: Path
) -> None:
    path = edited(DATA / f"{name}.gguf", tmp_path / "a.gguf", edit)
    with pytest.raises((UnsupportedError, CheckpointError), match=says):
        open_checkpoint(path)


def add(writer: gguf.GGUFWriter, name: str, size: int) -> None:
    writer.add_tensor(name, np.full(size, 2.0, np.float32))


def test_q_k_and_v_in_one_tensor(tmp_path: Path) -> None:
    """llama.cpp's converter puts them together when it is asked to."""

    def fuse(writer: gguf.GGUFWriter) -> None:
        for layer in range(2):
            for leaf in ("weight", "bias"):
                parts = [stored[f"blk.{layer}.attn_{one}.{leaf}"] for one in "qkv"]
                writer.add_tensor(f"blk.{layer}.attn_qkv.{leaf}", np.concatenate(parts))

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(DATA / "qwen2.gguf").tensors}
    path = edited(DATA / "qwen2.gguf", tmp_path / "a.gguf", fuse, without=r"attn_[qkv]\.")
    expected, found = (dict(checked_tensors(open_checkpoint(file))) for file in (DATA / "qwen2.gguf", path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
