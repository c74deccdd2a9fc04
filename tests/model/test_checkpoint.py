"""Safetensors folders: every tensor comes through, one at a time; what is not a whole model is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import save_adapter, save_toy_model, toy_config
from transformers import AutoModelForCausalLM

from bedplate.errors import BedplateError, CheckpointError, NotFoundError, UnsupportedError
from bedplate.model import checkpoint as of_checkpoint
from bedplate.model.checkpoint import (
    StoredMatrix,
    checked_matrix,
    checked_tensors,
    fingerprint,
    open_checkpoint,
)
from bedplate.model.load import float_decoder
from bedplate.model.stored import sources
from bedplate.model.tokenizer_files import read_tokenizer
from bedplate.spec import parameter_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(folder: Path) -> dict[str, Tensor]:
    return dict(checked_tensors(open_checkpoint(folder)))


def refused(folder: Path, kind: type[BedplateError], says: str) -> BedplateError:
    with pytest.raises(kind, match=says) as caught:
        read(folder)
    assert caught.value.where is not None and caught.value.where.startswith(str(folder))
    assert caught.value.hint
    return caught.value


@pytest.fixture
def folder(toy_model: Path, tmp_path: Path) -> Path:
    """A copy of the toy model to spoil. Its head is tied."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = save_toy_model(tmp_path / "whole", toy_config())
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    return tmp_path / "shards"


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_single_file(folder: Path) -> None:
    stored, found = load_file(folder / WEIGHTS), read(folder)
    at = {name: f"model.{source.name}" for name, source in sources(open_checkpoint(folder).spec).items()}
    assert {at[name] for name in found} == set(stored)
    assert all(torch.equal(value, stored[at[name]]) for name, value in found.items())
    assert {name: tuple(value.shape) for name, value in found.items()} == parameter_shapes(
        open_checkpoint(folder).spec
    )


def test_shards_hold_the_same_as_one_file(sharded: Path) -> None:
    whole, parts = read(sharded.parent / "whole"), read(sharded)
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert len(open_checkpoint(sharded).files) == 1 + len(list(sharded.glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_come_as_they_are_stored_and_become_float32_in_the_decoder(
    folder: Path, dtype: torch.dtype
) -> None:
    stored = {name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    parameters = dict(float_decoder(open_checkpoint(folder), max_context=8).named_parameters())
    at = sources(open_checkpoint(folder).spec)
    for name, value in read(folder).items():
        assert value.dtype == dtype and torch.equal(value, stored[f"model.{at[name].name}"]), name
        assert torch.equal(parameters[name], value.float()), name


def test_a_tied_head_is_the_embedding(folder: Path) -> None:
    decoder = float_decoder(open_checkpoint(folder), max_context=8)
    assert torch.equal(decoder.lm_head.weight, decoder.embed_tokens.weight)


def test_a_tied_head_may_be_in_the_file(folder: Path) -> None:
    before = read(folder)
    edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    after = read(folder)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in after)


def test_a_tied_head_of_other_values_is_no_silent_choice(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] + 1}))
    assert "tie_word_embeddings" in str(refused(folder, CheckpointError, r"lm_head\.weight").hint)


def test_an_untied_head_must_be_there(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, CheckpointError, r"1 tensors are missing, the first lm_head\.weight")


def test_what_older_versions_left_over_is_passed_over(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit_weights(folder, lambda tensors: tensors.update(extra))
    assert not any("inv_freq" in name for name in read(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, CheckpointError, r"1 tensors are missing, the first layers\.1\.mlp\.up_proj\.weight")


def test_a_tensor_too_many_is_named(folder: Path) -> None:
    extra = {"model.layers.1.self_attn.q_norm.weight": torch.ones(32)}
    edit_weights(folder, lambda tensors: tensors.update(extra))
    refused(folder, UnsupportedError, r"1 tensors .* layers\.1\.self_attn\.q_norm\.weight")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", EMBEDDING])
def test_a_shape_that_does_not_fit_is_named(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=f"{name.removeprefix('model.')} has shape .* the config wants"):
        open_checkpoint(folder)  # it takes no reading of values to find that
    refused(folder, CheckpointError, "has shape")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    edit_weights(folder, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][3, 5].fill_(value))
    refused(folder, CheckpointError, r"layers\.2\.mlp\.up_proj\.weight holds NaN or infinity")


def test_integers_are_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, UnsupportedError, r"up_proj\.weight has dtype I8")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert refused(sharded, CheckpointError, "the shard is missing").where == str(gone)


def test_an_index_that_names_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = sorted(sharded.glob("*.safetensors"))[0].name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, CheckpointError, r"model\.extra\.weight")


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, CheckpointError, r"model\.norm\.weight is in .* but that file does not hold it")


NO_INDEX = [
    "{",
    "[]",
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {}}',
    '{"weight_map": {"a": 1}}',
    "[" * 5000,
]


@pytest.mark.parametrize("content", NO_INDEX, ids=lambda content: content[:30])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    says = "is not an index|cannot be read as JSON|is not a JSON object|is nested too deeply"
    assert refused(sharded, CheckpointError, says).where == str(sharded / INDEX)


@pytest.mark.parametrize("file", ["../whole/model.safetensors", "/etc/passwd", "a/../../x", "", "..", "a\0b"])
def test_an_index_that_names_files_elsewhere(sharded: Path, file: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, CheckpointError, "not a file of this folder")


def test_shards_in_a_folder_of_their_own_and_behind_links(sharded: Path) -> None:
    """A download cache has links in the place of files."""
    whole = read(sharded.parent / "whole")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {name: f"parts/{file}" for name, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / "parts").mkdir()
    for file in sharded.glob("*.safetensors"):
        (sharded / "parts" / file.name).symlink_to(file.rename(sharded.parent / file.name))
    parts = read(sharded)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def logits(folder: Path) -> Tensor:
    """What transformers computes of the folder."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(torch.arange(8)[None]).logits[0]  # type: ignore[no-any-return]


def ours(folder: Path) -> Tensor:
    decoder = float_decoder(open_checkpoint(folder), max_context=8)
    with torch.no_grad():
        return decoder(torch.arange(8)[None], torch.tensor([0]), torch.zeros(8))[0]  # type: ignore[no-any-return]


def test_a_single_file_counts_before_an_index(sharded: Path) -> None:
    """A folder of shards, trained on and saved again as one file: the index and its shards are old."""
    other = save_toy_model(sharded.parent / "other", toy_config(), seed=1)
    old = logits(sharded)
    shutil.copy(sharded.parent / "other" / WEIGHTS, sharded / WEIGHTS)
    assert not torch.allclose(old, logits(sharded), atol=1)
    torch.testing.assert_close(ours(sharded), logits(sharded), rtol=0, atol=1e-3)
    torch.testing.assert_close(other.lm_head.weight, read(sharded)["embed_tokens.weight"], rtol=0, atol=0)


BESIDE = [
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "model-00001-of-00009.safetensors",
    "optimizer.safetensors",
]


@pytest.mark.parametrize("kind", ["single", "shards"])
def test_other_files_in_the_folder_are_not_the_model(kind: str, folder: Path, sharded: Path) -> None:
    model = folder if kind == "single" else sharded
    before = read(model)
    for name in BESIDE:
        save_file({"model.norm.weight": torch.zeros(64), "x": torch.ones(1)}, model / name)
    (model / "broken.safetensors").write_bytes(b"{")
    after = read(model)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(ours(model), logits(model), rtol=0, atol=1e-3)


def test_an_adapter_in_the_folder_of_a_model_is_refused(folder: Path) -> None:
    """transformers puts it on the model: to leave it out in silence would be another model."""
    before = logits(folder)
    save_adapter(folder, folder, seed=1)
    assert not torch.allclose(before, logits(folder), atol=1e-2)
    error = refused(folder, UnsupportedError, "an adapter in the folder of the model")
    assert "folder of their own" in str(error.hint)


def test_a_folder_that_is_an_adapter(toy_adapters: dict[str, Path]) -> None:
    error = refused(toy_adapters["all"], CheckpointError, "holds an adapter, not a model")
    assert "base_model_name_or_path" in str(error.hint)


@pytest.mark.parametrize("n_layers", [30, 2**20])
def test_more_layers_than_there_are_tensors(folder: Path, n_layers: int) -> None:
    edit_config(folder, num_hidden_layers=n_layers)
    refused(folder, CheckpointError, f"wants {n_layers} layers, but there are 29 tensors")


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "vocab_size"])
def test_the_largest_size_that_is_read(folder: Path, field: str) -> None:
    edit_config(folder, **{field: 2**20})
    refused(folder, CheckpointError, "has shape .* the config wants")


@pytest.mark.parametrize("short", [False, True], ids=["same name", "name without model."])
def test_a_tensor_in_two_files_is_no_silent_choice(folder: Path, short: bool) -> None:
    name = "model.norm.weight"
    second = name.removeprefix("model.") if short else name
    save_file({second: torch.ones(64)}, folder / "other.safetensors")
    (folder / WEIGHTS).rename(folder / "first.safetensors")
    listed = {EMBEDDING: "first.safetensors", second: "other.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    error = refused(folder, CheckpointError, r"norm\.weight is there twice")
    assert "first.safetensors" in str(error.hint)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_before_any_tensor(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file") as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / WEIGHTS) and caught.value.hint


def test_weights_in_bin_files_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in str(refused(folder, CheckpointError, r"neither model\.safetensors nor").hint)


def test_a_pointer_of_git_lfs_is_no_damaged_file(folder: Path) -> None:
    for file in (WEIGHTS, "tokenizer.json"):
        (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    assert "git lfs pull" in str(refused(folder, CheckpointError, "is not a whole safetensors file").hint)
    with pytest.raises(CheckpointError, match="not a tokenizer") as caught:
        read_tokenizer(folder)
    assert "git lfs pull" in str(caught.value.hint)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, r"there is no config\.json")


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere") and caught.value.hint


def test_the_fingerprint_is_of_the_content(folder: Path, toy_model: Path) -> None:
    same = fingerprint(open_checkpoint(folder))
    assert same == fingerprint(open_checkpoint(toy_model))
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"][0].add_(1e-3))
    changed = fingerprint(open_checkpoint(folder))
    assert changed != same
    edit_config(folder, rms_norm_eps=1e-4)
    assert fingerprint(open_checkpoint(folder)) not in (same, changed)


STREAM = """
import resource, sys
from pathlib import Path
from bedplate.model.checkpoint import checked_tensors, open_checkpoint

checkpoint = open_checkpoint(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checksum = sum(float(tensor[0].sum()) for _, tensor in checked_tensors(checkpoint))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_model_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    config = toy_config(hidden_size=256, intermediate_size=512, num_hidden_layers=24)
    model = save_toy_model(tmp_path / "whole", config)
    model.save_pretrained(tmp_path / "model", max_shard_size="4MB")
    nbytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert nbytes > 40e6
    result = subprocess.run(
        [sys.executable, "-c", STREAM, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    # One mapped shard, and a few tensors of half a megabyte.
    assert int(result.stdout) < 0.25 * nbytes


def test_one_tensor_at_a_time(toy_model: Path) -> None:
    """What has been taken and dropped is not held by the stream."""
    seen: list[weakref.ref[Tensor]] = []
    for _, tensor in checked_tensors(open_checkpoint(toy_model)):
        assert not any(reference() is not None for reference in seen[:-1])
        seen.append(weakref.ref(tensor))
        del tensor
    assert len(seen) > 20


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Three rows of the toy model at a time."""
    monkeypatch.setattr(of_checkpoint, "_PIECE_BYTES", 3 * 4 * toy_config().hidden_size)
    return 3


def matrix(of: Path) -> StoredMatrix:
    found = checked_matrix(open_checkpoint(of), "embed_tokens.weight")
    assert isinstance(found, StoredMatrix)
    return found


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_the_largest_matrices_are_read_some_rows_at_a_time(
    toy_model: Path, small_pieces: int, step: int
) -> None:
    whole = read(toy_model)["embed_tokens.weight"]
    stored = matrix(toy_model)
    assert tuple(stored.shape) == whole.shape
    blocks, pieces = [], list[weakref.ref[Tensor]]()
    for first in range(0, len(whole), step):
        blocks.append(stored[first : first + step].clone())
        if not pieces or stored._piece is not pieces[-1]():
            assert not any(piece() is not None for piece in pieces)
            pieces.append(weakref.ref(stored._piece))
        assert len(stored._piece) <= max(step, small_pieces)
    assert torch.equal(torch.cat(blocks), whole)


def test_rows_that_are_read_are_checked(folder: Path, small_pieces: int) -> None:
    edit_weights(folder, lambda tensors: tensors[EMBEDDING][7].fill_(float("nan")))
    stored = matrix(folder)
    assert stored[0:6].shape[0] == 6
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds NaN"):
        stored[6:9]


def test_other_tensors_are_read_whole(toy_model: Path) -> None:
    checkpoint = open_checkpoint(toy_model)
    others = set(checkpoint.names()) - {"embed_tokens.weight", "lm_head.weight"}
    assert all(isinstance(checked_matrix(checkpoint, name), Tensor) for name in others)


def test_loading_copies_nothing_twice(toy_model: Path) -> None:
    decoder = float_decoder(open_checkpoint(toy_model), max_context=8)
    pointers = {name: value.data_ptr() for name, value in decoder.named_parameters()}
    assert pointers["lm_head.weight"] == pointers["embed_tokens.weight"]
    assert not any(value.is_meta for value in decoder.state_dict().values())
    assert np.isfinite(decoder.norm.weight.detach().numpy()).all()
