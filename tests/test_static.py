"""Programs of fixed shapes, in ExecuTorch's own runtime, beside the programs that take any number of tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
from families import make_toy, save_toy
from forged import signed
from numpy.typing import NDArray
from recorder import Recorder
from shared import Shared
from stock import StockProgram
from toy import BuildToy, save_adapter, save_toy_model, save_toy_tokenizer, toy_config

import bedplate
from bedplate.api import Bundle
from bedplate.assemble.verify import verify_bundle
from bedplate.bundle import manifest, usage
from bedplate.bundle.usage import BASE
from bedplate.compile.static import lower_static
from bedplate.compile.units import StaticShapes
from bedplate.errors import BundleError, NotFoundError, RecipeError, RunError, UnsupportedError
from bedplate.model.checkpoint import open_checkpoint
from bedplate.model.load import float_decoder
from bedplate.model.static_attention import StaticDecoder
from bedplate.oracle import StaticHost, StaticProgram, static_program, stock_program

TEXT = [5, 9, 13, 2, 7, 11, 300, 1, 5, 44, 17, 17, 8, 250, 3, 99, 12]
CONTEXT = 24
RECIPES: dict[str, dict[str, Any]] = {
    "float": {"quantize": "none", "static_shapes": (6, 1)},
    "8da4w": {"static_shapes": (5, 2), "split_heads": True},
}


@pytest.fixture(scope="module")
def model(shared: Shared) -> Path:
    config = toy_config(num_hidden_layers=2)
    return shared.made("static.model", lambda folder: save_toy_model(folder, config, seed=8))


@pytest.fixture(scope="module")
def adapter(shared: Shared, model: Path) -> Path:
    return shared.made("static.adapter", lambda folder: save_adapter(folder, model, seed=9))


@pytest.fixture(scope="module")
def bundle_of(shared: Shared, build_toy: BuildToy, model: Path, adapter: Path) -> Callable[[str], Bundle]:
    """By recipe, with the adapter `a`."""

    def get(recipe: str) -> Bundle:
        def make(out: Path) -> None:
            made = build_toy(model, out=out, max_context=CONTEXT, **RECIPES[recipe])
            made.add(adapter, name="a", unit_cache=shared.units)

        return Bundle.open(shared.made(f"static.{recipe}.bundle", make))

    return get


@pytest.mark.slow
class TestBesideTheOtherProgram:
    @pytest.fixture(scope="class", params=RECIPES)
    @classmethod
    def bundle(cls, request: pytest.FixtureRequest, bundle_of: Callable[[str], Bundle]) -> Bundle:
        return bundle_of(request.param)

    @pytest.fixture(scope="class", params=[BASE, "a"])
    @classmethod
    def name(cls, request: pytest.FixtureRequest) -> str:
        found: str = request.param
        return found

    @pytest.fixture(scope="class")
    @classmethod
    def program(cls, bundle: Bundle, name: str) -> StaticProgram:
        return static_program(bundle, name)

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, bundle: Bundle, name: str) -> NDArray[np.float32]:
        return stock_program(bundle, name).logits(TEXT)

    def test_decoding_gives_its_logits(self, program: StaticProgram, expected: NDArray[np.float32]) -> None:
        check(program.logits(TEXT), expected)

    def test_prefill_in_pieces_and_then_decode(
        self, program: StaticProgram, expected: NDArray[np.float32]
    ) -> None:
        assert 14 % program.limits.max_seq_len > program.limits.max_logits_len - 1, (
            "the last piece is filled up"
        )
        check(program.step(TEXT[:14], 0), expected[13])
        for position in range(14, len(TEXT)):
            check(program.step(TEXT[position : position + 1], position), expected[position])
        # Back in the text: what was there is written over.
        check(program.step(TEXT[3:8], 3), expected[7])

    def test_a_text_as_long_as_the_context(self, program: StaticProgram) -> None:
        long = (TEXT * 2)[:CONTEXT]
        last = program.logits(long)[-1]
        check(program.step(long, 0), last)
        with pytest.raises(RunError, match=f"{CONTEXT + 1} tokens at position 0 do not fit the context"):
            program.step([*long, 1], 0)

    def test_inputs_of_another_shape_are_refused(self, program: StaticProgram) -> None:
        native = program._program
        shapes = native.input_shapes("decode")
        inputs: list[NDArray[Any]] = [np.zeros(shape, np.int64) for shape in shapes[:2]]
        inputs += [np.zeros(shape, np.float32) for shape in shapes[2:]]
        native.call("decode", inputs)
        short = [*inputs[:-1], inputs[-1][..., :-1].copy()]
        for wrong in (inputs[:-1], short, [inputs[0], *inputs[:-1]]):
            with pytest.raises(RuntimeError, match=r"takes .* tensors|has another type or shape"):
                native.call("decode", wrong)

    def test_the_same_constants(
        self, bundle: Bundle, build_toy: BuildToy, model: Path, adapter: Path
    ) -> None:
        """And not a byte more of them than in a bundle without programs."""
        options = {name: value for name, value in bundle_options(bundle).items() if name == "quantize"}
        without = build_toy(model, max_context=CONTEXT, programs=False, **options)
        without.add(adapter, name="a")
        assert bundle.foundation.read_bytes() == without.foundation.read_bytes()
        assert bundle.adapters["a"].weights.read_bytes() == without.adapters["a"].weights.read_bytes()
        programs = {use.name: use for use in usage.sharing(bundle).programs}
        assert programs.keys() == {"base", "base/static", "a", "a/static"}
        assert programs["a"].own == programs["a/static"].own > 0
        users = {constant.name: constant.users for constant in usage.constants(bundle)}
        assert users["attention_scale"] == ("base/static", "a/static")
        weights = [name for name in users if "_proj" in name and "lora" not in name and ".weight" in name]
        assert weights and all(users[name] == ("base", "base/static", "a", "a/static") for name in weights)

    def test_verify_runs_them(self, bundle: Bundle) -> None:
        verdict = verify_bundle(bundle, programs=True, threads=1)
        assert verdict.without_effect == [] and verdict.programs is not None
        found = {one.name: one for one in verdict.programs}
        assert list(found) == ["base", "a", "base/static", "a/static"]
        for name in ("base", "a"):
            ours, static = found[name].from_ours, found[f"{name}/static"].from_ours
            assert abs(ours.mean_kl - static.mean_kl) < 1e-3 * max(1, ours.mean_kl)
            assert (
                (found[name].effect is None) == (found[f"{name}/static"].effect is None) == (name == "base")
            )

    def test_one_file_that_wants_no_other(
        self, bundle: Bundle, name: str, program: StaticProgram, tmp_path: Path
    ) -> None:
        adapter = None if name == BASE else name
        bundle.export(
            tmp_path / "one.pte", adapter=adapter, static=True, self_contained=True, with_foundation=True
        )
        np.testing.assert_array_equal(StaticProgram(tmp_path / "one.pte").logits(TEXT), program.logits(TEXT))
        # In ExecuTorch's Python runtime, too.
        theirs = StockProgram(tmp_path / "one.pte")

        def call(method: str, inputs: list[NDArray[Any]]) -> Sequence[NDArray[np.float32]]:
            outputs = theirs.run_all(method, *map(torch.from_numpy, inputs))
            return [output.numpy() for output in outputs]

        host, decode = program._host, program.limits.max_logits_len
        again = StaticHost(
            call,
            lengths={"decode": decode},
            windows=[None],
            caches=[cache.shape for cache in host._caches],
            max_context=CONTEXT,
        )
        rows = [again.run("decode", TEXT[at : at + decode], at) for at in range(0, len(TEXT), decode)]
        check(np.concatenate(rows), program.logits(TEXT))


def bundle_options(bundle: Bundle) -> dict[str, Any]:
    shapes = bundle.manifest.model["static_shapes"]
    return next(options for options in RECIPES.values() if options["static_shapes"][0] == shapes["prefill"])


def check(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """But for the order of sums. Where it moves an input over the edge between two of its 8-bit codes, by more."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_an_adapter_of_a_known_structure_is_added_without_torch(
    bundle_of: Callable[[str], Bundle], adapter: Path, unit_cache: Path, tmp_path: Path
) -> None:
    script = """
import sys
import bedplate
path, adapter, cache = sys.argv[1:]
bedplate.Bundle.open(path).add(adapter, name="again", unit_cache=cache)
print("torch" in sys.modules, "executorch" in sys.modules)
"""
    copy = Path(shutil.copytree(bundle_of("float").path, tmp_path / "copy"))
    command = [sys.executable, "-c", script, str(copy), str(adapter), str(unit_cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
    adapters = Bundle.open(copy).adapters
    assert adapters["again"].static_program.read_bytes() == adapters["a"].static_program.read_bytes()


@pytest.mark.slow
def test_without_a_partitioner_executorch_computes_it_itself(model: Path) -> None:
    """Which backend computes is up to the partitioner. Weights are those of the decoder."""
    decoder = float_decoder(open_checkpoint(model), max_context=CONTEXT)
    shapes = StaticShapes(prefill=3, decode=2, split_heads=False)
    lowered = lower_static(decoder, shapes, []).to_executorch()
    assert not any(plan.delegates for plan in lowered.executorch_program.execution_plan)
    runtime = _load_for_executorch_from_buffer(lowered.buffer)

    def call(method: str, inputs: list[NDArray[Any]]) -> Sequence[NDArray[np.float32]]:
        outputs = runtime.run_method(method, [torch.from_numpy(value) for value in inputs])
        return [output.clone().numpy() for output in outputs]

    static = StaticDecoder(decoder, length=2, one_row=False, split_heads=False)
    host = StaticHost(
        call,
        lengths={"prefill": 3, "decode": 2},
        windows=static.windows,
        caches=[cache.shape for cache in static.example()[3]],
        max_context=CONTEXT,
    )
    with torch.no_grad():
        expected = decoder(torch.tensor([TEXT]), torch.tensor([0]), torch.zeros(len(TEXT)))[0].numpy()
    found = [host.run("prefill", TEXT[at : at + 3], at)[0] for at in range(0, 9, 3)]
    check(np.stack(found), expected[2:9:3])
    check(host.run("decode", TEXT[9:11], 9), expected[9:11])


@pytest.mark.slow
def test_a_model_with_windows_and_capped_scores(unit_cache: Path, tmp_path: Path) -> None:
    """It has no other program."""
    save_toy(tmp_path / "model", make_toy("gemma2", vocab_size=320, num_hidden_layers=2))
    save_toy_tokenizer(tmp_path / "model", 320)
    told = Recorder()
    bundle = bedplate.build(
        tmp_path / "model",
        tmp_path / "bundle",
        quantize="none",
        max_context=CONTEXT,
        static_shapes=(6, 1),
        unit_cache=unit_cache,
        reporter=told,
    )
    assert bundle.base_program is None and any("no base.pte" in notice for notice in told.notices)
    program = static_program(bundle)
    with bedplate.Engine(bundle, kv="float32") as engine:
        expected = engine.session().logits(TEXT)
    check(program.logits(TEXT), expected)
    check(program.step(TEXT, 0), expected[-1])
    verdict = verify_bundle(bundle, programs=True, threads=1)
    assert [one.name for one in verdict.programs or []] == ["base/static"]


class TestWhatIsRefused:
    """Before anything is compiled."""

    @pytest.mark.parametrize(
        ("shapes", "what"),
        [((0, 1), "a call of 0 tokens"), ((64, 25), "a call of 64 tokens"), ((8, -1), "a call of -1 tokens")],
    )
    def test_lengths(self, shapes: tuple[int, int], what: str, toy_model: Path, tmp_path: Path) -> None:
        with pytest.raises(
            UnsupportedError, match=f"{what} is not possible: .* 24 positions\nhint: .*1 and 24"
        ):
            bedplate.build(toy_model, tmp_path / "b", max_context=CONTEXT, static_shapes=shapes)
        assert not list(tmp_path.iterdir())

    def test_without_programs(self, toy_model: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="leave out --no-programs, or --static-shapes"):
            bedplate.build(toy_model, tmp_path / "b", static_shapes=(8, 1), programs=False)

    def test_split_heads_alone(self, toy_model: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="give --static-shapes, too"):
            bedplate.build(toy_model, tmp_path / "b", split_heads=True)

    def test_a_bundle_without_them(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        for name in (None, "all"):
            with pytest.raises(
                NotFoundError, match=r"has no program of fixed shapes\nhint: .*--static-shapes"
            ):
                toy_bundle.export(tmp_path / "x.pte", adapter=name, static=True)
        with pytest.raises(RunError, match="the program has no method decode"):
            StaticProgram(toy_bundle.base_program, [toy_bundle.foundation])

    @pytest.mark.parametrize(
        ("shapes", "says"),
        [
            (None, "expected"),
            ({"prefill": 8, "decode": 1}, "the field 'split_heads' is missing"),
            ({"prefill": 2**40, "decode": 1, "split_heads": False}, "no program has"),
        ],
    )
    def test_a_manifest_of_other_shapes(
        self, shapes: Any, says: str, toy_bundle: Bundle, toy_adapters: dict[str, Path], tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "edited.bundle"))
        shutil.copy(copy / manifest.BASE_PROGRAM, copy / manifest.STATIC_PROGRAM)
        document = json.loads((copy / manifest.MANIFEST).read_bytes())
        document["files"][manifest.STATIC_PROGRAM] = document["files"][manifest.BASE_PROGRAM]
        document["model"]["static_shapes"] = shapes
        (copy / manifest.MANIFEST).write_bytes(signed(document))
        with pytest.raises(BundleError, match=says):
            Bundle.open(copy).add(toy_adapters["all"], name="new")
