"""Bundles without programs: no torch.export, no ExecuTorch, and all that runs here works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_spec import SPEC
from toy import BuildToy

from bedplate.api import Bundle, build, evaluate
from bedplate.assemble.verify import verify_bundle
from bedplate.bundle import usage
from bedplate.errors import NotFoundError, UnsupportedError
from bedplate.names import ROWS, way_of
from bedplate.oracle import stock_program
from bedplate.quantize.joined import joined_names
from bedplate.quantize.recipe import EIGHT_BIT, FLOAT, WEIGHT_ONLY, Scheme
from bedplate.runtime.engine import Engine

TEXT = [5, 9, 13, 2, 7]
FOUR = Scheme(bits=4, group_size=32)


@pytest.fixture(scope="module")
def bundle(build_toy: BuildToy, toy_adapters: dict[str, Path]) -> Bundle:
    """As `toy_bundle`, with no programs."""
    made = build_toy(programs=False)
    made.add(toy_adapters["all"], name="all", quantize="none")
    made.add(toy_adapters["all2"], name="all2", quantize="none")
    made.add(toy_adapters["all"], name="all8", quantize="8w")
    return Bundle.open(made.path)


def files(bundle: Bundle) -> set[str]:
    return {
        path.relative_to(bundle.path).as_posix()
        for path in bundle.path.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_it_is_a_bundle_with_programs_without_them(bundle: Bundle, toy_bundle: Bundle) -> None:
    """All other files are the same to the byte, so an adapter of one fits the other."""
    programs = {name for name in files(toy_bundle) if name.endswith(".pte")}
    assert len(programs) == 4 and files(bundle) == files(toy_bundle) - programs
    for name in files(bundle) - {"bundle.json"}:
        assert (bundle.path / name).read_bytes() == (toy_bundle.path / name).read_bytes(), name


def test_only_hqq_needs_torchao(
    build_toy: BuildToy, toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UnsupportedError, match=r"package torchao\nhint: pip install 'bedplate\[build\]'"):
        build(toy_model, tmp_path / "hqq", method="hqq", programs=False)
    assert not list(tmp_path.iterdir())
    build_toy(programs=False)


# Every build and every `add` with programs asserts the same of its own recipe; these join what no other test does.
# The base of two schemes is that of test_numerics.py, which is lowered once for both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "adapter"),
    [
        ({"recovery_rank": 4, "overrides": {"layers.*.self_attn.v_proj": "8da8w"}}, "qv"),
        ({"recovery_rank": 4, "method": "plain"}, "all"),
    ],
    ids=["of two schemes", "recovery"],
)
def test_what_is_joined_does_not_depend_on_programs(
    options: dict[str, object],
    adapter: str,
    build_toy: BuildToy,
    toy_adapters: dict[str, Path],
    unit_cache: Path,
) -> None:
    built = {programs: build_toy(programs=programs, **options) for programs in (True, False)}
    for programs, one in built.items():
        one.add(toy_adapters[adapter], name="a", exact_rank=True, programs=programs, unit_cache=unit_cache)
    assert built[True].foundation.read_bytes() == built[False].foundation.read_bytes()
    weights = [one.adapters["a"].weights.read_bytes() for one in built.values()]
    assert weights[0] == weights[1]


class TestWhatIsJoined:
    """q, k and v of one scheme, of an adapter and of a correction too."""

    PATHS = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")

    def test_linears_with_their_biases(self) -> None:
        schemes = {**dict.fromkeys(self.PATHS, FOUR), "layers.0.mlp.gate_proj": FOUR, "lm_head": FOUR}
        q, whole = "layers.0.self_attn.q", "layers.0.self_attn.q_proj+k_proj+v_proj"
        assert joined_names(schemes) == {f"{whole}.weight#codes", f"{whole}.weight#scales"}
        assert joined_names(schemes, self.PATHS) == {*joined_names(schemes), f"{whole}.bias"}
        assert joined_names({f"{q}_proj": FOUR}) == set()

    def test_by_scheme(self) -> None:
        mixed = dict(zip(self.PATHS, (FOUR, EIGHT_BIT, FOUR), strict=True))
        assert joined_names(mixed) == {
            f"layers.0.self_attn.q_proj+v_proj.weight#{part}" for part in ("codes", "scales")
        }
        assert joined_names(dict(zip(self.PATHS, (FOUR, EIGHT_BIT, FLOAT), strict=True))) == set()

    def test_branches(self) -> None:
        schemes = {f"{path}.{half}": FLOAT for path in self.PATHS[::2] for half in ("lora_a", "lora_b")}
        assert joined_names(schemes) == {
            "layers.0.self_attn.q_proj+v_proj.lora_a.weight",
            "layers.0.self_attn.q_proj&v_proj.lora_b.weight",
        }

    def test_never_of_two_layers(self) -> None:
        schemes = {
            f"layers.{layer}.self_attn.{name}_proj": WEIGHT_ONLY
            for layer in range(SPEC.n_layers)
            for name in "qk"
        }
        names = joined_names(schemes)
        assert len(names) == 2 * SPEC.n_layers and {way_of(name) for name in names} == {ROWS}
        assert all(len(set(re.findall(r"layers\.\d+", name))) == 1 for name in names)


class TestEverythingThatRunsHereWorks:
    def test_running(self, bundle: Bundle, toy_bundle: Bundle) -> None:
        with Engine(bundle) as one, Engine(toy_bundle) as other:
            for name in (None, *bundle.adapters):
                np.testing.assert_array_equal(one.session(name).step(TEXT), other.session(name).step(TEXT))

    def test_evaluating(self, bundle: Bundle, toy_bundle: Bundle, toy_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 5)
        found = [evaluate(one, toy_model, text, adapters=["all8"]) for one in (bundle, toy_bundle)]
        assert found[0] == found[1]

    def test_verifying(self, bundle: Bundle) -> None:
        verdict = verify_bundle(bundle, programs=False, threads=None)
        assert verdict.without_effect == [] and verdict.sharing.programs == () and verdict.programs is None
        assert verdict.sharing.foundation > 0 and verdict.own.keys() == bundle.adapters.keys()

    def test_inspecting(self, bundle: Bundle, toy_bundle: Bundle) -> None:
        ours, theirs = usage.constants(bundle), usage.constants(toy_bundle)
        assert [(one.name, one.key, one.owner) for one in ours] == [
            (one.name, one.key, one.owner) for one in theirs
        ]
        assert all(one.users == () for one in ours)

    def test_adding_and_removing(self, bundle: Bundle, toy_adapters: dict[str, Path], tmp_path: Path) -> None:
        copy = Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy"))
        entry = copy.add(toy_adapters["qv"], name="qv")
        assert entry.program is None and entry.nbytes == entry.weights.stat().st_size
        assert entry.info.rank == entry.info.unit_rank == 8
        copy.remove("all")
        assert sorted(Bundle.open(copy.path).adapters) == ["all2", "all8", "qv"]


class TestWhatNeedsPrograms:
    def test_says_that_the_bundle_has_none(self, bundle: Bundle, toy_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("the quick brown fox")
        again = re.escape(f"bedplate build MODEL -o {bundle.path} --force, and bedplate add for each adapter")
        what = rf"has no program: it was made without programs\nhint: make it again without --no-programs: {again}"
        for name in (None, "all"):
            with pytest.raises(NotFoundError, match=what):
                bundle.export(tmp_path / "x.pte", adapter=name)
            with pytest.raises(NotFoundError, match=what):
                stock_program(bundle, name or "base")
        with pytest.raises(NotFoundError, match=what):
            verify_bundle(bundle, programs=True, threads=None)
        with pytest.raises(NotFoundError, match=what):
            evaluate(bundle, toy_model, text, programs=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]

    def test_says_that_an_adapter_has_none(
        self, toy_bundle: Bundle, toy_adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        copy = Bundle.open(shutil.copytree(toy_bundle.path, tmp_path / "copy"))
        assert copy.add(toy_adapters["qv"], name="qv", programs=False).program is None
        again = re.escape(f"bedplate remove {copy.path} qv, and bedplate add")
        what = (
            rf"'qv' has no program: it was made without programs, or is more than a LoRA\nhint: .*: {again}"
        )
        for ask in (
            lambda: copy.export(tmp_path / "x.pte", adapter="qv"),
            lambda: verify_bundle(copy, programs=True, threads=None),
        ):
            with pytest.raises(NotFoundError, match=what):
                ask()
        copy.export(tmp_path / "all.pte", adapter="all")
        assert [use.name for use in usage.sharing(copy).programs] == ["base", "all", "all2", "all8"]
        assert verify_bundle(copy, programs=False, threads=None).without_effect == []


SCRIPT = """
import sys
from importlib import metadata
sys.modules["executorch"] = None
of = metadata.version
def version(name):
    if name == "executorch":
        raise metadata.PackageNotFoundError(name)
    return of(name)
metadata.version = version
import bedplate
from bedplate.assemble.verify import verify_bundle
model, text, out, *adapters = sys.argv[1:]
bundle = bedplate.build(model, out, programs=False)
bundle.add_all({f"a{i}": adapter for i, adapter in enumerate(adapters)})
with bedplate.Engine(bundle) as engine:
    for name in (None, *bundle.adapters):
        engine.session(name).generate("the fox", max_tokens=3)
assert verify_bundle(bundle, programs=False, threads=1).without_effect == []
assert len(bedplate.evaluate(bundle, model, text)) == 1 + len(adapters)
bundle.remove("a0")
"""


def test_executorch_need_not_be_there(toy_model: Path, toy_adapters: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    args = [toy_model, tmp_path / "text.txt", tmp_path / "out", toy_adapters["all"], toy_adapters["qv"]]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "cache").exists(), "nothing was compiled"
