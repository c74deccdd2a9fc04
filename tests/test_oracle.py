"""Stock programs in ExecuTorch's own runtime, beside its Python runtime, which takes one data file at most."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stock
import torch
from numpy.typing import NDArray

from bedplate.api import Bundle
from bedplate.bundle.usage import BASE
from bedplate.errors import BedplateError, BundleError, NotFoundError, RunError, UnsupportedError
from bedplate.oracle import StockProgram, stock_program, stock_programs

TEXT = [5, 9, 13, 2, 7, 11, 300, 1, 5]
LONG = TEXT * 9  # more than `logits` takes in one call, and more than `forward` was shown in others


@pytest.fixture(scope="module", params=["toy_bundle", "float_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def programs(bundle: Bundle) -> dict[str, StockProgram]:
    return stock_programs(bundle)


@pytest.fixture(scope="module")
def base(toy_bundle: Bundle) -> StockProgram:
    return stock_program(toy_bundle)


@pytest.fixture(scope="module")
def expected(programs: dict[str, StockProgram]) -> NDArray[np.float32]:
    """Of an adapter's program with two data files."""
    return programs["all"].logits(TEXT)


class TestAllOfABundleTogether:
    def test_each_program_gives_its_own_logits(
        self, bundle: Bundle, programs: dict[str, StockProgram]
    ) -> None:
        assert programs.keys() == {BASE, *bundle.adapters}
        together = {name: program.logits(TEXT) for name, program in programs.items()}
        for name, logits in together.items():
            assert logits.shape == (len(TEXT), programs[name].limits.vocab)
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, stock_program(bundle, name).logits(TEXT))
        for one in together:
            for other in together:
                if one != other:
                    assert np.abs(together[one] - together[other]).max() > 1e-3

    def test_the_base_as_executorchs_python_runtime(
        self, bundle: Bundle, programs: dict[str, StockProgram]
    ) -> None:
        theirs = stock.StockProgram(bundle.base_program, bundle.foundation)
        expected = theirs.run("logits", torch.tensor([TEXT]), torch.tensor([0])).numpy()[0]
        np.testing.assert_array_equal(programs[BASE].logits(TEXT), expected)
        np.testing.assert_array_equal(programs[BASE].step(TEXT, 0), expected[-1])

    def test_steps_go_on_where_the_last_one_ended(self, programs: dict[str, StockProgram]) -> None:
        for program in programs.values():
            expected = program.logits(TEXT)
            for position, token in enumerate(TEXT):
                got = program.step([token], position)
                np.testing.assert_allclose(got, expected[position], rtol=0, atol=1e-4 * np.abs(got).max())

    def test_a_text_forgets_the_one_before(self, programs: dict[str, StockProgram]) -> None:
        for program in programs.values():
            expected = program.logits(TEXT)
            program.logits(LONG[::-1])
            np.testing.assert_array_equal(program.logits(TEXT), expected)
            np.testing.assert_array_equal(program.step(TEXT, 0), expected[-1])

    def test_a_long_text_is_read_in_pieces(self, programs: dict[str, StockProgram]) -> None:
        for program in programs.values():
            assert len(LONG) > program.limits.max_logits_len
            logits = program.logits(LONG)
            assert len(logits) == len(LONG)
            got = program.step(LONG, 0)
            np.testing.assert_allclose(got, logits[-1], rtol=0, atol=1e-4 * np.abs(got).max())

    def test_the_weight_cache_changes_no_result(
        self, bundle: Bundle, programs: dict[str, StockProgram]
    ) -> None:
        for name, program in programs.items():
            alone = stock_program(bundle, name, weight_cache=False)
            np.testing.assert_array_equal(alone.logits(TEXT), program.logits(TEXT))

    def test_the_base_may_go_while_adapters_stay(self, bundle: Bundle) -> None:
        loaded = stock_programs(bundle)
        expected = {name: program.logits(TEXT) for name, program in loaded.items()}
        del loaded[BASE]
        for name, program in loaded.items():
            np.testing.assert_array_equal(program.logits(TEXT), expected[name])


class TestTheWaysToShip:
    """What is exported holds the same constants elsewhere, so it gives the same logits."""

    @pytest.mark.parametrize(
        ("self_contained", "with_foundation"), [(True, True), (False, True), (True, False), (False, False)]
    )
    def test_an_adapter(
        self,
        self_contained: bool,
        with_foundation: bool,
        bundle: Bundle,
        expected: NDArray[np.float32],
        tmp_path: Path,
    ) -> None:
        out = tmp_path / "one.pte"
        bundle.export(out, adapter="all", self_contained=self_contained, with_foundation=with_foundation)
        data = [] if with_foundation else [bundle.foundation]
        data += [] if self_contained else [bundle.adapters["all"].weights]
        np.testing.assert_array_equal(StockProgram(out, data).logits(TEXT), expected)
        if len(data) < 2:
            theirs = stock.StockProgram(out, *data)
            logits = theirs.run("logits", torch.tensor([TEXT]), torch.tensor([0])).numpy()[0]
            np.testing.assert_array_equal(logits, expected)

    def test_the_base_with_the_foundation_inside(self, bundle: Bundle, tmp_path: Path) -> None:
        bundle.export(tmp_path / "base.pte", with_foundation=True)
        logits = StockProgram(tmp_path / "base.pte").logits(TEXT)
        np.testing.assert_array_equal(logits, stock_program(bundle).logits(TEXT))


def test_packed_weights_are_there_once(float_bundle: Bundle) -> None:
    """Loaded so often that what is packed for each shows beside all else that a program takes."""
    script = """
import os, sys
from pathlib import Path
from bedplate.bundle.store import Bundle
from bedplate.oracle import stock_program
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
bundle, keep = Bundle.open(sys.argv[1]), []
for cache in (True, False):
    keep.append(stock_program(bundle, "all", weight_cache=cache))
    keep.append(stock_program(bundle, "qv", weight_cache=cache))
    before = resident()
    for _ in range(20):
        keep += [stock_program(bundle, name, weight_cache=cache) for name in ("all", "qv")]
    print(resident() - before)
"""
    command = [sys.executable, "-c", script, str(float_bundle.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    shared, apart = map(int, result.stdout.split())
    packed = sum(
        constant.nbytes for constant in float_bundle.foundation_info.constants if "_proj" in constant.name
    )
    # 40 programs of two methods each.
    assert apart - shared > 0.9 * 80 * packed > 30_000_000


class TestLoadingFails:
    """Each time in words, and without harm to a program that is loaded already."""

    @pytest.fixture(autouse=True)
    def another_program_goes_on_working(self, base: StockProgram) -> Iterator[None]:
        before = base.logits(TEXT)
        yield
        np.testing.assert_array_equal(base.logits(TEXT), before)

    def test_no_such_file(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"nowhere\.pte: no such file\nhint: bedplate verify BUNDLE"):
            StockProgram(tmp_path / "nowhere.pte", [toy_bundle.foundation])
        with pytest.raises(NotFoundError, match=r"nowhere\.ptd: no such data file"):
            StockProgram(toy_bundle.base_program, [tmp_path / "nowhere.ptd"])

    def test_a_folder_in_place_of_a_file(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"the file cannot be read: Is a directory\nhint: check that"):
            StockProgram(tmp_path, [toy_bundle.foundation])
        with pytest.raises(RunError, match=r"the file cannot be read: Is a directory\nhint: check that"):
            StockProgram(toy_bundle.base_program, [tmp_path])

    def test_no_data_file(self, toy_bundle: Bundle) -> None:
        what = r"base\.pte: no data file holds \d+ of its constants.*\nhint: bedplate verify .*data files were: none"
        with pytest.raises(RunError, match=what):
            StockProgram(toy_bundle.base_program)

    def test_the_data_file_of_another_program(self, toy_bundle: Bundle) -> None:
        one, other = toy_bundle.adapters["all"], toy_bundle.adapters["all2"]
        what = rf"program\.pte: no data file holds \d+ of its constants.*\nhint: .*{other.weights}"
        with pytest.raises(RunError, match=what):
            StockProgram(one.program, [toy_bundle.foundation, other.weights])

    def test_the_foundation_alone_or_the_adapter_alone(self, toy_bundle: Bundle) -> None:
        entry = toy_bundle.adapters["all"]
        for data in (toy_bundle.foundation, entry.weights):
            with pytest.raises(RunError, match="no data file holds"):
                StockProgram(entry.program, [data])

    def test_the_foundation_of_another_model(self, toy_bundle: Bundle, float_bundle: Bundle) -> None:
        with pytest.raises(RunError, match="no data file holds"):
            StockProgram(toy_bundle.base_program, [float_bundle.foundation])

    def test_two_files_with_one_key(self, toy_bundle: Bundle) -> None:
        with pytest.raises(
            BundleError, match=r"foundation\.ptd: it holds \d+ keys that are also in .*foundation\.ptd"
        ):
            StockProgram(toy_bundle.base_program, [toy_bundle.foundation, toy_bundle.foundation])

    def test_files_in_each_others_place(self, toy_bundle: Bundle) -> None:
        with pytest.raises(BundleError, match=r"base\.pte"):
            StockProgram(toy_bundle.foundation, [toy_bundle.base_program])
        with pytest.raises(RunError, match=r"cannot read .*foundation\.ptd: .*InvalidProgram"):
            StockProgram(toy_bundle.foundation, [toy_bundle.foundation])

    def test_a_program_cut_short(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        whole, cut = toy_bundle.base_program.read_bytes(), tmp_path / "cut.pte"
        for length in (0, 1, 7, 8, 100, *range(1000, len(whole), len(whole) // 20), len(whole) - 1):
            cut.write_bytes(whole[:length])
            with pytest.raises(RunError, match=r"cut\.pte"):
                StockProgram(cut, [toy_bundle.foundation])

    def test_a_data_file_cut_short(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        whole, cut = toy_bundle.foundation.read_bytes(), tmp_path / "cut.ptd"
        for length in (0, 1, 7, 8, 100, *range(1000, len(whole), len(whole) // 20), len(whole) - 128):
            cut.write_bytes(whole[:length])
            with pytest.raises(BedplateError, match=r"cut\.ptd"):
                StockProgram(toy_bundle.base_program, [cut])

    def test_a_program_of_noise(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        noise = tmp_path / "noise.pte"
        noise.write_bytes(np.random.default_rng(0).bytes(100_000))
        with pytest.raises(RunError, match=r"cannot read .*noise\.pte"):
            StockProgram(noise, [toy_bundle.foundation])

    def test_a_program_that_is_no_language_model(self, tmp_path: Path) -> None:
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(torch.nn.ReLU(), (torch.zeros(3),))
        to_edge_transform_and_lower(exported).to_executorch().save(str(tmp_path / "relu.pte"))
        with pytest.raises(RunError, match=r"relu\.pte: the program has no method get_max_context_len"):
            StockProgram(tmp_path / "relu.pte")

    def test_an_adapter_that_the_bundle_does_not_have(self, toy_bundle: Bundle) -> None:
        with pytest.raises(NotFoundError, match="no adapter 'nobody'\nhint: the bundle has: all, all2, all8"):
            stock_program(toy_bundle, "nobody")


def test_a_bundle_with_a_damaged_program_is_not_opened(toy_bundle: Bundle, tmp_path: Path) -> None:
    """A damaged program can do anything, so it must not come as far as here."""
    copy = Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))
    program = bytearray((copy / "base.pte").read_bytes())
    program[len(program) // 2] ^= 1
    (copy / "base.pte").write_bytes(program)
    with pytest.raises(BundleError, match=r"base\.pte"):
        Bundle.open(copy)


class TestWhatAProgramCannotTake:
    @pytest.mark.parametrize(
        ("token_ids", "position", "what"),
        [
            ([], 0, "there are no tokens"),
            ([1], -1, "1 tokens at position -1 do not fit the context of 128"),
            ([1], 128, "1 tokens at position 128 do not fit the context of 128"),
            ([1], 10, "the tokens are at position 10, but only 9 tokens were run before"),
            ([1] * 100, 29, "100 tokens at position 29 do not fit the context of 128"),
            ([1, 320], 0, "token 320 is not in the vocabulary of 320 tokens"),
            ([1, -1], 0, "token -1 is not in the vocabulary of 320 tokens"),
        ],
    )
    def test_is_refused(self, token_ids: list[int], position: int, what: str, base: StockProgram) -> None:
        expected = base.logits(TEXT)
        with pytest.raises(RunError, match=f"base.pte: {what}\nhint: "):
            base.step(token_ids, position)
        if position == 0:
            with pytest.raises(RunError, match=f"base.pte: {what}\nhint: "):
                base.logits(token_ids)
        np.testing.assert_allclose(base.step([5], len(TEXT)), base.logits([*TEXT, 5])[-1], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(base.logits(TEXT), expected)

    def test_a_text_that_fills_the_program(self, base: StockProgram) -> None:
        assert len(base.logits([1] * base.limits.max_context)) == base.limits.max_context
        with pytest.raises(RunError, match="129 tokens at position 0 do not fit the context of 128"):
            base.logits([1] * 129)


@pytest.mark.parametrize("missing", ["bedplate._oracle", "executorch.extension.llm.custom_ops.custom_ops"])
def test_an_installation_without_an_oracle(
    missing: str, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        UnsupportedError, match=rf"needs ExecuTorch.*{missing}.*\nhint: pip install 'bedplate\[build\]'"
    ):
        stock_program(toy_bundle)
