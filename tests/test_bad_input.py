"""Bad input, through the Python API and the command line: an error in words, and nothing changed on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig
from safetensors.torch import load_file, save_file
from shared import Shared
from torch import Tensor
from toy import BuildToy, save_adapter, save_toy_model, toy_config

import bedplate
from bedplate.bundle import manifest
from bedplate.errors import (
    AdapterError,
    ArgumentError,
    BedplateError,
    BundleError,
    CalibrationError,
    CheckpointError,
    ContextFullError,
    NameTakenError,
    NotFoundError,
    RecipeError,
    RunError,
    UnsupportedError,
)

Edit = Callable[[Path], Any]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tree(*folders: Path) -> dict[Path, str]:
    """Every file below with its content's hash, and every folder."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def refused(kind: type[BedplateError], says: str, *folders: Path) -> Iterator[None]:
    """The block raises this error, with a hint, and leaves all in the folders as it was."""
    before = tree(*folders)
    with pytest.raises(kind, match=says) as caught:
        yield
    assert type(caught.value) is kind
    assert caught.value.what and caught.value.hint
    if not issubclass(kind, (RunError, RecipeError)):  # requests, which are at no place
        assert caught.value.where
    assert tree(*folders) == before


@pytest.fixture
def unit_cache(shared: Shared, toy_bundle: bedplate.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what the toy bundle needs. No other test writes to it, so that it must stay as it is."""
    return shared.copy_units(tmp_path_factory.mktemp("cache") / "units")


@pytest.fixture
def model(toy_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


@pytest.fixture
def adapter(toy_adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_adapters["all"], tmp_path / "adapter"))


@pytest.fixture
def bundle(toy_bundle: bedplate.Bundle, tmp_path: Path) -> bedplate.Bundle:
    """A bundle to spoil, with the adapters `all`, `all2` and `all8`."""
    return bedplate.Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))


def config(file: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**fields, **changes}))

    return edit


def weights(file: str, change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)

    return edit


def cut(file: str) -> Edit:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


# --- Models ---------------------------------------------------------------------------------------------------

LAST_WEIGHT = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        (lambda folder: shutil.rmtree(folder), NotFoundError, "no such file or folder"),
        (lambda folder: (folder / "config.json").unlink(), CheckpointError, r"there is no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, "JSON"),
        (config("config.json", architectures=["GemmaForCausalLM"]), UnsupportedError, "GemmaForCausalLM"),
        (config("config.json", model_type="granite"), UnsupportedError, "model_type 'granite'"),
        (config("config.json", is_causal=False), UnsupportedError, "is_causal = False"),
        (config("config.json", hidden_act="gelu"), UnsupportedError, "hidden_act = 'gelu'"),
        (config("config.json", rope_parameters={"rope_type": "axial"}), UnsupportedError, "axial"),
        (config("config.json", quantization_config={"bits": 4}), UnsupportedError, "quantization_config"),
        (config("config.json", intermediate_size=128), CheckpointError, "has shape .* the config wants"),
        (config("config.json", num_hidden_layers=4), CheckpointError, "9 tensors are missing"),
        (
            config("config.json", num_hidden_layers=10**6),
            CheckpointError,
            "1000000 layers, but .* 29 tensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            CheckpointError,
            r"neither model\.safetensors",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            UnsupportedError,
            "an adapter in the folder of the model",
        ),
        (config("generation_config.json", eos_token_id=-1), CheckpointError, "no token -1"),
        (
            config("tokenizer_config.json", extra_special_tokens=[*map(str, range(100, 111))]),
            CheckpointError,
            r"ids up to 320 \('110'\), but the embedding of the model has 320 rows",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), CheckpointError, r"no tokenizer\.json"),
        (cut("model.safetensors"), CheckpointError, "not a whole safetensors file"),
        (
            weights("model.safetensors", lambda t: t.pop(LAST_WEIGHT)),
            CheckpointError,
            "1 tensors are missing",
        ),
        (
            weights("model.safetensors", lambda t: t.update({"model.extra": torch.ones(1)})),
            UnsupportedError,
            "have no place",
        ),
        (
            weights("model.safetensors", lambda t: t[LAST_WEIGHT][0, 0].fill_(float("nan"))),
            CheckpointError,
            "NaN",
        ),
    ],
    ids=[
        "no folder",
        "no config",
        "config no JSON",
        "architecture",
        "model type",
        "bidirectional",
        "activation",
        "RoPE",
        "quantized",
        "shapes",
        "deeper",
        "much deeper",
        "no weights",
        "with an adapter",
        "end token",
        "tokens beyond the embedding",
        "no tokenizer",
        "truncated",
        "tensor missing",
        "tensor too many",
        "NaN",
    ],
)
def test_a_model_that_cannot_be_built(
    edit: Edit, kind: type[BedplateError], says: str, model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    edit(model)
    out = tmp_path / "new.bundle"
    with refused(kind, says, tmp_path, unit_cache):
        bedplate.build(model, out, max_context=128, unit_cache=unit_cache)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "4bit"}, "unknown quantization '4bit'"),
        ({"group_size": 48}, "group size 48 is not supported"),
        ({"group_size": 64}, "group size 64 does not divide the width 96"),
        ({"method": "gptq"}, "unknown method"),
        ({"embedding": "2"}, "unknown bits of the embedding"),
        ({"head": "8da2w"}, "unknown quantization '8da2w'"),
        ({"overrides": {"*.dwon_proj": "8da8w"}}, "matches no linear"),
        ({"target_kl": 1e-9}, "no choice of 4 and 8 bits has a mean KL of at most 1e-09"),
        ({"bytes_per_weight": 0.5}, "4 bits already take 0.6476 bytes a weight"),
        ({"quantize": "8da8w", "target_kl": 0.1}, "there is no linear whose bits can be chosen"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_applied(
    options: dict[str, Any], says: str, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    with refused(RecipeError, says, tmp_path, unit_cache):
        bedplate.build(toy_model, tmp_path / "new.bundle", max_context=128, unit_cache=unit_cache, **options)


def test_a_calibration_text_without_text_is_refused_before_anything_is_compiled(
    toy_model: Path, tmp_path: Path
) -> None:
    text, units = tmp_path / "empty.txt", tmp_path / "units"
    text.write_text("")
    with refused(CalibrationError, "holds no text", tmp_path):
        bedplate.build(
            toy_model, tmp_path / "new.bundle", max_context=128, unit_cache=units, calibration=text
        )
    assert not units.exists()


@pytest.mark.parametrize("max_context", [0, -1, 257, 2.5, True, "64"])
def test_a_context_that_the_model_does_not_have(max_context: Any, toy_model: Path, tmp_path: Path) -> None:
    with refused(UnsupportedError, "has 256 positions", tmp_path):
        bedplate.build(toy_model, tmp_path / "new.bundle", max_context=max_context)


def test_a_place_that_is_taken(
    bundle: bedplate.Bundle, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    def build(out: Path, *, force: bool) -> None:
        bedplate.build(toy_model, out, max_context=128, unit_cache=unit_cache, force=force)

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with refused(NameTakenError, "exists already", tmp_path):
        build(bundle.path, force=False)
    for name in ("notes", "file"):
        with refused(NameTakenError, "is not a bundle", tmp_path):
            build(tmp_path / name, force=True)
    with refused(NotFoundError, "no such folder", tmp_path):
        build(tmp_path / "nowhere" / "new.bundle", force=False)


def test_a_bundle_survives_its_failing_replacement(
    bundle: bedplate.Bundle, model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    weights("model.safetensors", lambda t: t[LAST_WEIGHT][0, 0].fill_(float("inf")))(model)
    with refused(CheckpointError, "infinity", tmp_path):
        bedplate.build(model, bundle.path, max_context=128, unit_cache=unit_cache, force=True)
    assert sorted(bedplate.Bundle.open(bundle.path).adapters) == ["all", "all2", "all8"]


# --- Adapters -------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("edit", "kind", "says"),
    [
        (lambda folder: shutil.rmtree(folder), NotFoundError, "no such file or folder"),
        (lambda folder: (folder / CONFIG).unlink(), AdapterError, "there is no adapter_config"),
        (lambda folder: (folder / WEIGHTS).unlink(), AdapterError, "there is no adapter_model"),
        (lambda folder: (folder / CONFIG).write_text("?"), AdapterError, "not JSON"),
        (
            lambda folder: IA3Config(target_modules=["k_proj"], feedforward_modules=[]).save_pretrained(
                folder
            ),
            UnsupportedError,
            "IA3",
        ),
        (
            lambda folder: LoHaConfig(target_modules=["k_proj"]).save_pretrained(folder),
            UnsupportedError,
            "LOHA",
        ),
        (config(CONFIG, use_dora=True), AdapterError, "no magnitude"),
        (config(CONFIG, modules_to_save=["lm_head"]), AdapterError, "the weights do not hold it"),
        (config(CONFIG, rank_pattern={"q_proj": 2}), AdapterError, "rank_pattern"),
        (config(CONFIG, bias="some"), UnsupportedError, 'bias = "some"'),
        (config(CONFIG, init_lora_weights="pissa"), UnsupportedError, "pissa"),
        (config(CONFIG, use_something_new=True), UnsupportedError, "use_something_new"),
        (config(CONFIG, r=8), AdapterError, "rank 8"),
        (config(CONFIG, target_modules=["q_proj", "lm_head"]), AdapterError, "the config does not adapt"),
        (weights(WEIGHTS, lambda t: t.update({FIRST: torch.ones(4, 96)})), AdapterError, "has shape"),
        (weights(WEIGHTS, lambda t: t.pop(FIRST)), AdapterError, "is missing"),
        (
            weights(
                WEIGHTS, lambda t: t.update({"base_model.model.h.0.c_attn.lora_A.weight": torch.ones(4, 64)})
            ),
            UnsupportedError,
            "a LoRA on a module that bedplate does not know",
        ),
        (weights(WEIGHTS, lambda t: t[FIRST][0, 0].fill_(float("nan"))), AdapterError, "NaN"),
        (cut(WEIGHTS), AdapterError, "not a whole safetensors file"),
    ],
    ids=[
        "no folder",
        "no config",
        "no weights",
        "no JSON",
        "IA3",
        "LoHa",
        "DoRA",
        "modules_to_save",
        "rank_pattern",
        "bias",
        "PiSSA",
        "unknown field",
        "rank",
        "target",
        "shape",
        "half",
        "keys",
        "NaN",
        "truncated",
    ],
)
def test_an_adapter_that_cannot_be_added(
    edit: Edit,
    kind: type[BedplateError],
    says: str,
    bundle: bedplate.Bundle,
    adapter: Path,
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    edit(adapter)
    with refused(kind, says, tmp_path, unit_cache):
        bundle.add(adapter, name="new", unit_cache=unit_cache)
    assert "new" not in bundle.adapters


def test_an_adapter_of_another_model(bundle: bedplate.Bundle, unit_cache: Path, tmp_path: Path) -> None:
    save_toy_model(tmp_path / "other", toy_config(intermediate_size=128))
    other = save_adapter(tmp_path / "adapter", tmp_path / "other", seed=1, targets=["up_proj"])
    with refused(
        AdapterError, r"lora_B of layers\.0\.mlp\.up_proj has shape \(128, 4\)", tmp_path, unit_cache
    ):
        bundle.add(other, name="new", unit_cache=unit_cache)


@pytest.mark.parametrize("name", ["", "base", "../out", "a/b", ".hidden", "two words"])
def test_a_name_that_is_none(name: str, bundle: bedplate.Bundle, adapter: Path, tmp_path: Path) -> None:
    with refused(AdapterError, "cannot be the name of an adapter", tmp_path):
        bundle.add(adapter, name=name)


def test_a_name_already_taken(bundle: bedplate.Bundle, adapter: Path, tmp_path: Path) -> None:
    with refused(NameTakenError, "an adapter 'all2' already", tmp_path):
        bundle.add(adapter, name="all2")


def test_a_quantization_of_adapters_that_is_none(
    bundle: bedplate.Bundle, adapter: Path, unit_cache: Path, tmp_path: Path
) -> None:
    wrong: Any = "8da4w"
    with refused(RecipeError, "unknown quantization of adapters '8da4w'", tmp_path, unit_cache):
        bundle.add(adapter, name="new", quantize=wrong, unit_cache=unit_cache)


def test_what_is_not_there_cannot_be_removed_or_exported(bundle: bedplate.Bundle, tmp_path: Path) -> None:
    with refused(NotFoundError, "no adapter 'none'", tmp_path):
        bundle.remove("none")
    with refused(NotFoundError, "no adapter 'none'", tmp_path):
        bundle.export(tmp_path / "x.pte", adapter="none")
    with refused(NotFoundError, "no such folder", tmp_path):
        bundle.export(tmp_path / "nowhere" / "x.pte", adapter="all")


# --- Bundles --------------------------------------------------------------------------------------------------


def test_no_such_bundle(tmp_path: Path, toy_model: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", toy_model, toy_model / "config.json"):
        with refused(NotFoundError, "not a bundle", tmp_path, toy_model):
            bedplate.Bundle.open(path)


def files_of(bundle: bedplate.Bundle) -> list[Path]:
    listed = [bundle.path / name for name in bundle.manifest.files]
    listed += [
        bundle.path / "adapters" / name / file
        for name, record in bundle.manifest.adapters.items()
        for file in record.files
    ]
    return [bundle.path / manifest.MANIFEST, *listed]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_any_damaged_file_is_named(damage: str, bundle: bedplate.Bundle, tmp_path: Path) -> None:
    files = files_of(bundle)
    assert len(files) == 1 + 5 + 3 * 3
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(whole[:middle])
        else:
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        kind = NotFoundError if damage == "missing" and path.name == manifest.MANIFEST else BundleError
        with refused(kind, path.name, tmp_path):
            bedplate.Bundle.open(bundle.path)
        path.write_bytes(whole)
    bedplate.Bundle.open(bundle.path)


def test_an_adapter_packed_against_another_foundation(
    bundle: bedplate.Bundle, build_toy: BuildToy, adapter: Path, unit_cache: Path, tmp_path: Path
) -> None:
    """Same structure, other weights; and the manifest lists it as if it were one of its own."""
    save_toy_model(tmp_path / "other", toy_config(), seed=1)
    other = build_toy(tmp_path / "other")
    other.add(adapter, name="foreign", unit_cache=unit_cache)
    assert other.foundation_sha256 != bundle.foundation_sha256
    shutil.copytree(other.path / "adapters" / "foreign", bundle.path / "adapters" / "foreign")
    records = {**bundle.manifest.adapters, "foreign": other.manifest.adapters["foreign"]}
    document = dataclasses.replace(bundle.manifest, adapters=records)
    (bundle.path / manifest.MANIFEST).write_bytes(manifest.dump(document))
    with refused(BundleError, "packed against another foundation", tmp_path):
        bedplate.Bundle.open(bundle.path)


def test_the_foundation_of_another_bundle(
    bundle: bedplate.Bundle, build_toy: BuildToy, tmp_path: Path
) -> None:
    save_toy_model(tmp_path / "other", toy_config(), seed=1)
    other = build_toy(tmp_path / "other")
    shutil.copy(other.foundation, bundle.foundation)
    assert other.foundation.stat().st_size == bundle.manifest.files["foundation.ptd"].size
    with refused(BundleError, r"foundation\.ptd: its SHA-256 is not", tmp_path):
        bedplate.Bundle.open(bundle.path)


# --- Requests -------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_met(toy_bundle: bedplate.Bundle) -> None:
    folder = toy_bundle.path
    with refused(RunError, "threads", folder):
        bedplate.Engine(toy_bundle, threads=0)
    with bedplate.Engine(toy_bundle, threads=1, max_context=128) as engine:
        with refused(NotFoundError, "no adapter 'none'", folder):
            engine.session("none")
        session = engine.session("all")
        with refused(NotFoundError, "no adapter 'none'", folder):
            session.use("none")
        with refused(ContextFullError, "129 tokens do not fit the context of 128", folder):
            session.logits([5] * 129)
        with refused(ContextFullError, "do not fit the context of 128", folder):
            session.generate("fox " * 300, max_tokens=1)
        with refused(ArgumentError, "token 320 is not in the vocabulary", folder):
            session.step([320])
        with refused(RunError, "there are no tokens", folder):
            session.generate("", max_tokens=1)
        with refused(RunError, "max_tokens is 0", folder):
            session.generate("fox", max_tokens=0)
        assert session.logits([5, 6]).shape == (2, 320)  # and it goes on working


# --- The command line -----------------------------------------------------------------------------------------


def command_fails(*args: object, says: str, unchanged: Path) -> None:
    before = tree(unchanged)
    command = [sys.executable, "-c", "from bedplate.cli.main import main; main()", *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert says in result.stderr and "\nhint: " in result.stderr and "Traceback" not in result.stderr
    assert tree(unchanged) == before


def test_the_command_build_of_a_folder_without_a_config(
    model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    (model / "config.json").unlink()
    out = tmp_path / "new.bundle"
    args = ("build", model, "-o", out, "--unit-cache", unit_cache)
    command_fails(*args, says="there is no config.json", unchanged=tmp_path)


def test_the_command_add_of_an_adapter_with_megatron(
    bundle: bedplate.Bundle, adapter: Path, unit_cache: Path, tmp_path: Path
) -> None:
    config(CONFIG, megatron_config={"a": 1})(adapter)
    args = ("add", bundle.path, adapter, "--name", "new", "--unit-cache", unit_cache)
    command_fails(*args, says="megatron_config", unchanged=tmp_path)


def test_the_command_run_of_a_bundle_with_a_flipped_byte(bundle: bedplate.Bundle, tmp_path: Path) -> None:
    data = bytearray(bundle.foundation.read_bytes())
    data[len(data) // 3] ^= 0x10
    bundle.foundation.write_bytes(data)
    args = ("run", bundle.path, "--adapter", "all", "-p", "fox")
    command_fails(*args, says="foundation.ptd: its SHA-256 is not", unchanged=tmp_path)
