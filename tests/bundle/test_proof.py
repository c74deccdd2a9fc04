"""Keys are computed again from what lies under them: a bundle that agrees with itself and lies is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged import describe, flip, settle
from toy_bundle import adapter_writer, program, write_base

from bedplate.bundle.facts import BundleFacts
from bedplate.bundle.manifest import ConstantInfo
from bedplate.bundle.proof import check_keys
from bedplate.bundle.ptd import read_ptd, write_ptd
from bedplate.bundle.store import Bundle, create_bundle
from bedplate.constants import Constant
from bedplate.errors import BundleError
from bedplate.names import DIAGONAL, ROWS, Way, joined_name
from bedplate.quantize.joined import join
from bedplate.quantize.packing import pack_embedding, pack_float, pack_linear

RNG = np.random.default_rng(0)


def linear(name: str, bits: int, group_size: int | None, *, weight_only: bool = False) -> list[Constant]:
    codes = RNG.integers(-8, 8, (6, 64), dtype=np.int8)
    groups = 64 // (group_size or 64)
    scales = np.float32(2.0) ** RNG.integers(-8, -1, (6, groups)).astype(np.float32)
    return pack_linear(name, codes, scales, bits=bits, group_size=group_size or 64, weight_only=weight_only)


def embedding(name: str, bits: int, groups: int) -> list[Constant]:
    codes = RNG.integers(-8, 8, (10, 64), dtype=np.int8)
    return pack_embedding(name, codes, RNG.uniform(1, 2, (10, groups)).astype(np.float32), bits=bits)


def dense(name: str, *, is_tensor: bool) -> list[Constant]:
    return pack_float(name, RNG.standard_normal((6, 64), dtype=np.float32), is_tensor=is_tensor)


def joined(way: Way, pack: Callable[[str], list[Constant]]) -> list[Constant]:
    parts = [pack(f"layers.0.self_attn.{one}_proj.{way}.weight") for one in "qkv"]
    return [join(joined_name([c.name for c in same], way), same) for same in zip(*parts, strict=True)]


KINDS: dict[str, Callable[[], list[Constant]]] = {
    "4 bits by groups": lambda: linear("layers.0.mlp.up_proj.weight", 4, 32),
    "4 bits by rows": lambda: linear("layers.0.mlp.gate_proj.weight", 4, None),
    "8 bits by rows": lambda: linear("lm_head.weight", 8, None),
    "8 bits by groups": lambda: linear("layers.1.mlp.up_proj.weight", 8, 32),
    "8 bits, weight only": lambda: linear("layers.0.mlp.up_proj.lora_a.weight", 8, None, weight_only=True),
    "embedding of 4 bits": lambda: embedding("embed_tokens.weight", 4, 2),
    "embedding of 8 bits": lambda: embedding("embed_tokens.weight", 8, 1),
    "embedding of floats": lambda: dense("embed_tokens.weight", is_tensor=True),
    "linear of floats": lambda: dense("layers.0.mlp.down_proj.weight", is_tensor=False),
    "joined by rows, 4 bits": lambda: joined(ROWS, lambda name: linear(name, 4, 32)),
    "joined by rows, floats": lambda: joined(ROWS, lambda name: dense(name, is_tensor=False)),
    "joined on the diagonal, 8 bits": lambda: joined(
        DIAGONAL, lambda name: linear(name, 8, None, weight_only=True)
    ),
    "joined on the diagonal, floats": lambda: joined(DIAGONAL, lambda name: dense(name, is_tensor=False)),
}


def bundle_of(out: Path, constants: list[Constant]) -> Bundle:
    """A bundle whose foundation, and whose adapter `own`, hold constants of one kind."""

    def write(folder: Path) -> BundleFacts:
        facts = write_base(folder)
        infos = write_ptd(folder / "foundation.ptd", constants)
        (folder / "base.pte").write_bytes(program(constants))
        return dataclasses.replace(facts, constants=infos)

    return create_bundle(out, write)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holder", ["foundation", "adapter"])
def test_other_bytes_under_a_key_of_any_kind_are_refused(tmp_path: Path, kind: str, holder: str) -> None:
    constants = KINDS[kind]()
    if holder == "foundation":
        bundle = bundle_of(tmp_path / "a.bundle", constants)
        file = bundle.foundation
    else:
        bundle = create_bundle(tmp_path / "a.bundle", write_base)
        bundle.add_adapters({"one": adapter_writer(bundle, "one", 0, own=tuple(constants))})
        file = bundle.adapters["one"].weights
    check_keys(bundle)
    for constant in constants:
        for byte in (0, constant.nbytes // 2, constant.nbytes - 1):
            flip(file, constant.key, byte)
            settle(bundle.path)
            with pytest.raises(BundleError) as caught:
                check_keys(Bundle.open(bundle.path))
            assert caught.value.where == str(file)
            assert constant.name in caught.value.what and "is not what its key says" in caught.value.what
            assert caught.value.hint
            flip(file, constant.key, byte)
    settle(bundle.path)
    check_keys(Bundle.open(bundle.path))


def test_codes_with_other_scales_are_refused(tmp_path: Path) -> None:
    """The scales' own key may be right: the codes' key names the scales too, for XNNPACK goes by that alone."""
    one, two = (linear(f"layers.{i}.mlp.up_proj.weight", 8, None) for i in range(2))
    bundle = bundle_of(tmp_path / "a.bundle", [*one, *two])
    described = bundle.path / "foundation.json"
    describe(described, lambda info: info._replace(scales=info.scales and two[1].key))
    settle(bundle.path)
    with pytest.raises(BundleError, match=r"layers\.0\.mlp\.up_proj\.weight#codes is not what its key says"):
        check_keys(Bundle.open(bundle.path))
    describe(described, lambda info: info._replace(scales=info.scales and "0" * 64))
    settle(bundle.path)
    with pytest.raises(BundleError, match="has scales that are nowhere: no constant has the key 0000"):
        check_keys(Bundle.open(bundle.path))


def test_scales_that_the_foundation_holds_are_found_there(tmp_path: Path) -> None:
    codes, scales = linear("layers.0.mlp.up_proj.weight", 8, None)
    bundle = bundle_of(tmp_path / "a.bundle", [scales])
    bundle.add_adapters({"one": adapter_writer(bundle, "one", 0, own=(codes,), shared=(scales,))})
    check_keys(bundle)
    flip(bundle.adapters["one"].weights, codes.key)
    with pytest.raises(BundleError, match="is not what its key says"):
        check_keys(bundle)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"dtype": "uint8"}, "is not what its key says"),
        ({"shape": (64, 6)}, "is not what its key says"),
        ({"layout": "dense"}, "is not what its key says"),
        ({"layout": "tensor"}, "is not stored as int8 of 384 bytes"),
        ({"scales": None}, "is not what its key says"),
        ({"nbytes": 7}, "is not stored as int8 of 7 bytes"),
        ({"key": "0" * 64}, "is not in it: no constant has the key 0000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_told_of_a_constant_is_what_its_key_says(
    tmp_path: Path, edit: dict[str, Any], says: str
) -> None:
    codes, scales = linear("lm_head.weight", 8, None)
    bundle = bundle_of(tmp_path / "a.bundle", [codes, scales])

    def change(info: ConstantInfo) -> ConstantInfo:
        return info._replace(**edit) if info.key == codes.key else info

    describe(bundle.path / "foundation.json", change)
    settle(bundle.path)
    with pytest.raises(BundleError, match="lm_head.weight#codes " + says):
        check_keys(Bundle.open(bundle.path))


def test_a_constant_that_is_described_nowhere_is_refused(tmp_path: Path) -> None:
    constants = [*linear("lm_head.weight", 8, None), *dense("norm.weight", is_tensor=True)]
    bundle = bundle_of(tmp_path / "a.bundle", constants[:2])
    write_ptd(bundle.foundation, constants)
    settle(bundle.path)
    with pytest.raises(BundleError, match=f"no file describes the key {constants[2].key}"):
        check_keys(Bundle.open(bundle.path))


def test_many_problems_are_counted(tmp_path: Path) -> None:
    constants = [dense(f"norm{i}.weight", is_tensor=True)[0] for i in range(7)]
    bundle = bundle_of(tmp_path / "a.bundle", constants)
    for constant in constants:
        flip(bundle.foundation, constant.key)
    with pytest.raises(BundleError, match=r"norm0\.weight .*; and 2 more\nhint: build the bundle again"):
        check_keys(bundle)


# --- Bundles of a model: whatever the packing, the joining and the structure put into them ----------------------


def held(bundle: Bundle) -> Iterator[tuple[Path, ConstantInfo]]:
    for info in bundle.foundation_info.constants:
        yield bundle.foundation, info
    for entry in bundle.adapters.values():
        for info in entry.info.constants:
            yield entry.weights, info


@pytest.mark.parametrize("of", ["toy_bundle", "float_bundle"])
def test_every_kind_of_constant_of_a_model_is_proven(
    of: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(request.getfixturevalue(of).path, tmp_path / "copy"))
    check_keys(bundle)
    names = {info.name for _, info in held(bundle)}
    expected = {"rope.cos_0", "rope.rotation", "rms_norm.mean_row", "norm.weight"}
    expected |= {"layers.0.self_attn.q_proj+k_proj+v_proj.weight" + ("#codes" if of == "toy_bundle" else "")}
    expected |= {"layers.0.self_attn.q_proj&k_proj&v_proj.lora_b.weight"}
    assert expected <= names
    assert of == "float_bundle" or any("directions.weight#codes" in name for name in names)
    one_of_each = {
        (file.parent.name, re.sub(r"\d+", "*", info.name)): (file, info.key) for file, info in held(bundle)
    }
    for file, key in one_of_each.values():
        flip(file, key, byte=read_ptd(file).entries[key].nbytes // 2)
        with pytest.raises(BundleError, match="is not what its key says") as caught:
            check_keys(bundle)
        assert caught.value.where == str(file)
        assert any(info.name in caught.value.what for _, info in held(bundle) if info.key == key)
        flip(file, key, byte=read_ptd(file).entries[key].nbytes // 2)
    check_keys(bundle)
