"""Damaged or odd adapter files: an adapter equal to what PEFT reads, or an error in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_oracle import TOLERANCE, Oracle
from safetensors.torch import load_file, save_file
from torch import Tensor

from bedplate.errors import AdapterError, BedplateError, UnsupportedError
from bedplate.model.adapter.peft_fields import NO_EFFECT, REFUSED, USED

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

texts = st.one_of(
    st.sampled_from(["q_proj", "v_proj", "all-linear", "(", "[[a]", "none", "layers", "\ud800", "gaussian"]),
    st.text(st.characters(), max_size=6),
)
numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**400, 2**31, float("nan"), float("inf"), 1e300, 4.0, 0.5, 1e-320]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
fields = st.one_of(st.sampled_from(sorted(USED | NO_EFFECT | REFUSED.keys())), texts)


@pytest.fixture(scope="module")
def oracle(toy_model: Path) -> Oracle:
    return Oracle(toy_model)


@pytest.fixture(scope="module")
def pristine(toy_adapters: dict[str, Path]) -> Path:
    return toy_adapters["qv"]


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "adapter"))


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def equals_peft_or_is_refused(oracle: Oracle, folder: Path) -> None:
    try:
        adapter = oracle.read(folder)
    except BedplateError as error:
        assert error.where and error.where.startswith(str(folder)) and error.hint
        str(error).encode()  # it can be shown
        return
    try:
        expected = oracle.peft(folder)
    except Exception:  # there is no answer to be equal to
        return
    torch.testing.assert_close(oracle.applied(adapter), expected, rtol=1e-5, atol=TOLERANCE, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(fields, values, min_size=1, max_size=2))
def test_any_config(changes: dict[str, Any], oracle: Oracle, pristine: Path, tmp_path_factory: Any) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("any") / "adapter"))
    write_config(folder, **changes)
    equals_peft_or_is_refused(oracle, folder)


@st.composite
def tensor_changes(draw: st.DrawFn) -> tuple[int, str, Any]:
    """The tensor's place in the file, what is done to it, and with what."""
    change = draw(st.sampled_from(["shape", "value", "dtype", "drop", "rename", "copy"]))
    names = [
        "lora_A",
        "lora_B",
        "layers.1",
        "layers.7",
        "k_proj",
        "mlp.up_proj",
        "module",
        "default",
        "x",
        "",
    ]
    return (
        draw(st.integers(0, 11)),
        change,
        {
            "shape": draw(st.lists(st.integers(0, 9), max_size=4)),
            "value": draw(st.sampled_from([0.0, float("nan"), float("inf"), 3e38, 1e-45, -2.0])),
            "dtype": draw(st.sampled_from([torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn])),
            "drop": None,
            "rename": (draw(st.sampled_from(names)), draw(st.sampled_from(names))),
            "copy": (draw(st.sampled_from(names)), draw(st.sampled_from(names))),
        }[change],
    )


def apply(tensors: dict[str, Tensor], place: int, change: str, how: Any) -> None:
    name = sorted(tensors)[place % len(tensors)]
    value = tensors[name]
    if change == "shape":
        tensors[name] = torch.ones(how)
    elif change == "value":
        tensors[name] = value.clone()
        tensors[name].flatten()[:3] = how
    elif change == "dtype":
        tensors[name] = value.to(how)
    elif change == "copy":
        tensors[name.replace(*how)] = value.clone()
    else:
        del tensors[name]
        if change == "rename":
            tensors[name.replace(*how)] = value


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(tensor_changes(), min_size=1, max_size=2))
def test_any_tensors(changes: list[Any], oracle: Oracle, pristine: Path, tmp_path_factory: Any) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("any") / "adapter"))
    tensors = load_file(folder / WEIGHTS)
    for change in changes:
        apply(tensors, *change)
    save_file(tensors, folder / WEIGHTS)
    names = set(tensors)
    if any("module" in name or "default" in name for name in names) or not all(
        name.startswith("base_model.model.model.") for name in names
    ):
        return  # PEFT does not know these forms of names; test_adapter_keys.py has them
    equals_peft_or_is_refused(oracle, folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *(("r", value, "r must be a positive integer") for value in (0, -1, "4", 4.0, True, None, 10**400)),
        *(("lora_alpha", value, "lora_alpha must be a number") for value in ("8", None, True, 10**400, [1])),
        ("lora_alpha", float("nan"), "lora_alpha must be a number"),
        ("lora_alpha", float("inf"), "lora_alpha must be a number"),
        ("use_rslora", "yes", 'use_rslora must be true or false, got "yes"'),
        ("target_modules", [1], r"target_modules must be a list of names, got \[1\]"),
        ("target_modules", {"a": 1}, "target_modules must be a list of names"),
        ("target_modules", "(", r"target_modules holds .*, which is not a regular expression"),
        ("exclude_modules", "*", "exclude_modules holds .*, which is not a regular expression"),
        ("rank_pattern", ["q_proj"], "rank_pattern must be an object"),
        ("rank_pattern", {"q_proj": 0}, r'rank_pattern\["q_proj"\] must be a positive integer, got 0'),
        ("rank_pattern", {"(": 4}, "rank_pattern holds .*, which is not a regular expression"),
        ("alpha_pattern", {"q_proj": "9"}, r'alpha_pattern\["q_proj"\] must be a number, got "9"'),
        ("layers_to_transform", ["0"], "layers_to_transform must be a list of integers"),
        ("layers_to_transform", 1.0, "layers_to_transform must be a list of integers"),
        ("layers_pattern", "layers", "layers_pattern stands there without layers_to_transform"),
        ("target_parameters", "weight", "the config does not adapt|both name"),
        ("use_bdlora", True, "use_bdlora must be an object"),
        ("use_bdlora", {}, "use_bdlora names .* neither for A nor for B"),
        ("use_bdlora", {"nblocks": 0}, r"use_bdlora\.nblocks must be a positive integer"),
        ("use_bdlora", {"new": 0}, r"use_bdlora\.new is not supported"),
        ("bias", "some", 'bias = "some" is not supported'),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind(field: str, value: Any, says: str, folder: Path, oracle: Oracle) -> None:
    write_config(folder, **{field: value})
    with pytest.raises((AdapterError, UnsupportedError), match=says) as caught:
        oracle.read(folder)
    assert caught.value.where == str(folder / CONFIG) and caught.value.hint


def test_what_a_config_leaves_out_is_as_in_peft(folder: Path, oracle: Oracle) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "task_type": config["task_type"]}))
    assert oracle.assert_equal(folder).alpha == 8, "r 8, lora_alpha 8, q_proj and v_proj"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"r": "\xe9"}',
        '{"peft_type": "LORA"}'.encode("utf-16"),
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"a": ' * 1000 + b"1" + b"}" * 1000,
        b'{"r": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_config_that_is_none(content: bytes, folder: Path, oracle: Oracle) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises((AdapterError, UnsupportedError)) as caught:
        oracle.read(folder)
    assert caught.value.where == str(folder / CONFIG) and len(str(caught.value)) < 500


def test_a_field_nested_deep(folder: Path, oracle: Oracle) -> None:
    deep = '{"a": ' * 900 + "1" + "}" * 900
    text = (folder / CONFIG).read_text().rstrip().removesuffix("}")
    (folder / CONFIG).write_text(f'{text}, "deep": {deep}}}')
    with pytest.raises((AdapterError, UnsupportedError), match=r"deep|is not JSON"):
        oracle.read(folder)


@pytest.mark.parametrize("alpha", [1e38, 1e300])
def test_an_alpha_beyond_float32(alpha: float, folder: Path, oracle: Oracle) -> None:
    tensors = {name: torch.full_like(value, 1e3) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    write_config(folder, lora_alpha=alpha)
    with pytest.raises(AdapterError, match="too large for float32"):
        oracle.read(folder)


@pytest.mark.parametrize("number", range(2))
def test_values_whose_products_are_beyond_float32(number: int, folder: Path, oracle: Oracle) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[number]
    tensors[name][0] = 3e38
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"too large for (products in )?float32"):
        oracle.read(folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_is_a_folder(file: str, folder: Path, oracle: Oracle) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        oracle.read(folder)
