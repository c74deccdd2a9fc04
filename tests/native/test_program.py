"""Loading, failing to load, and stepping programs, one layer below Engine and Session."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bedplate import _native
from bedplate.bundle.store import Bundle


def load(program: Path, *data: Path, weight_cache: bool = True) -> _native.Program:
    files = [str(file) for file in data]
    loaded = _native.Program(str(program), files, _native.Activations(), weight_cache)
    loaded.load("forward")
    return loaded


@pytest.fixture
def base(toy_bundle: Bundle) -> _native.Program:
    return load(toy_bundle.base_program, toy_bundle.foundation)


def run(program: _native.Program, tokens: list[int]) -> NDArray[np.float32]:
    kv = _native.KvCache(program.kv_bytes("forward"))
    return program.step("forward", tokens, 0, kv).array


class TestLoadingFails:
    """Each time with a NativeError that says what, and without harm to a program that is loaded already."""

    @pytest.fixture(autouse=True)
    def another_program_goes_on_working(self, base: _native.Program) -> object:
        before = run(base, [1, 2, 3])
        yield
        np.testing.assert_array_equal(run(base, [1, 2, 3]), before)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(_native.NativeError, match=r"nowhere\.pte.*No such file") as caught:
            load(tmp_path / "nowhere.pte")
        assert caught.value.args[0] == "AccessFailed"

    def test_no_data_file(self, toy_bundle: Bundle) -> None:
        with pytest.raises(_native.NativeError, match="cannot load method forward"):
            load(toy_bundle.base_program)

    def test_a_data_file_that_lacks_the_constants(self, toy_bundle: Bundle) -> None:
        weights = next(iter(toy_bundle.adapters.values())).weights
        with pytest.raises(_native.NativeError, match="no data file holds the constant "):
            load(toy_bundle.base_program, weights)

    def test_two_files_with_one_key(self, toy_bundle: Bundle) -> None:
        with pytest.raises(_native.NativeError, match="Duplicate key"):
            load(toy_bundle.base_program, toy_bundle.foundation, toy_bundle.foundation)

    def test_a_program_cut_short(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        cut = tmp_path / "cut.pte"
        cut.write_bytes(toy_bundle.base_program.read_bytes()[:-5000])
        with pytest.raises(_native.NativeError, match="cannot"):
            load(cut, toy_bundle.foundation)

    def test_an_empty_file(self, toy_bundle: Bundle, tmp_path: Path) -> None:
        empty = tmp_path / "empty.pte"
        empty.touch()
        with pytest.raises(_native.NativeError, match=r"cannot read .*empty\.pte"):
            load(empty, toy_bundle.foundation)

    def test_files_in_each_others_place(self, toy_bundle: Bundle) -> None:
        with pytest.raises(_native.NativeError, match="cannot read"):
            load(toy_bundle.foundation, toy_bundle.base_program)

    def test_no_such_method(self, base: _native.Program) -> None:
        with pytest.raises(_native.NativeError, match="cannot load method backward"):
            base.load("backward")


def test_executorch_writes_nothing_to_stderr(
    toy_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(_native.NativeError):
        load(tmp_path / "nowhere.pte")
    run(load(toy_bundle.base_program, toy_bundle.foundation), [1])
    assert capfd.readouterr() == ("", "")


def test_a_step_that_fails_leaves_the_program_working(base: _native.Program) -> None:
    before = run(base, [1, 2, 3])
    kv = _native.KvCache(base.kv_bytes("forward"))
    with pytest.raises(_native.NativeError, match="at position 1000000"):
        base.step("forward", [1], 1_000_000, kv)
    with pytest.raises(_native.NativeError, match="KV cache has 64 bytes"):
        base.step("forward", [1], 0, _native.KvCache(64))
    with pytest.raises(_native.NativeError, match="on 0 tokens"):
        base.step("forward", [], 0, kv)
    np.testing.assert_array_equal(run(base, [1, 2, 3]), before)


def test_conversations_do_not_touch_each_other(base: _native.Program) -> None:
    kvs = [_native.KvCache(base.kv_bytes("forward")) for _ in range(2)]
    texts = [[1, 2, 3, 4], [9, 8, 7, 6]]
    for i in range(4):
        steps = [base.step("forward", [t[i]], i, kv).array for t, kv in zip(texts, kvs, strict=True)]
    for text, got in zip(texts, steps, strict=True):
        np.testing.assert_allclose(got, run(base, text), rtol=0, atol=1e-4 * np.abs(got).max())


def test_untouched_positions_cost_no_memory(base: _native.Program) -> None:
    kv = _native.KvCache(1 << 30)
    assert (kv.nbytes, kv.resident) == (1 << 30, 0)
    base.step("forward", [1], 0, kv)
    assert 0 < kv.resident <= base.kv_bytes("forward")
    kv.release()
    assert kv.resident == 0


def test_programs_share_activations_and_one_may_go(toy_bundle: Bundle) -> None:
    adapter = next(iter(toy_bundle.adapters.values()))
    base = (str(toy_bundle.base_program), [str(toy_bundle.foundation)])
    adapted = (str(adapter.program), [str(toy_bundle.foundation), str(adapter.weights)])
    activations, apart = _native.Activations(), _native.Activations()
    first = _native.Program(*base, activations, True)
    expected, of_first = run(first, [1, 2, 3]), activations.nbytes
    other = run(_native.Program(*adapted, apart, True), [1, 2, 3])
    second = _native.Program(*adapted, activations, True)
    np.testing.assert_array_equal(run(second, [1, 2, 3]), other)
    assert activations.nbytes == max(of_first, apart.nbytes) > 0
    np.testing.assert_array_equal(run(first, [1, 2, 3]), expected)
    del first
    np.testing.assert_array_equal(run(second, [1, 2, 3]), other)


def test_weights_packed_once_or_for_each_program_give_the_same(toy_bundle: Bundle) -> None:
    packed = [
        load(toy_bundle.base_program, toy_bundle.foundation, weight_cache=cache) for cache in (True, False)
    ]
    np.testing.assert_array_equal(*(run(program, [1, 2, 3]) for program in packed))


def test_the_files_may_be_replaced_while_loaded(toy_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "base.pte"
    shutil.copy(toy_bundle.base_program, path)
    program = load(path, toy_bundle.foundation)
    before = run(program, [1, 2, 3])
    path.unlink()
    np.testing.assert_array_equal(run(program, [1, 2, 3]), before)


def test_threads_may_step_at_once(base: _native.Program) -> None:
    expected, results = run(base, [1, 2, 3]), []
    threads = [threading.Thread(target=lambda: results.append(run(base, [1, 2, 3]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_the_runtime_needs_no_torch() -> None:
    """Neither the modules nor the libraries: a device that only runs bundles has none."""
    code = (
        "import sys, bedplate._native, bedplate.runtime.engine\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers')]\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libexecutorch.so' in maps\n"
        "assert 'libtorch' not in maps and 'libc10' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def beside_executorch(toy_bundle: Bundle) -> subprocess.CompletedProcess[str]:
    """A process that uses ours before and after it imports ExecuTorch's own bindings and operators."""
    code = (
        "import sys, numpy as np\n"
        "from bedplate import _native\n"
        "def run():\n"
        "    program = _native.Program(sys.argv[1], [sys.argv[2]], _native.Activations(), True)\n"
        "    kv = _native.KvCache(program.kv_bytes('forward'))\n"
        "    return program.step('forward', [0, 1, 2], 0, kv).array\n"
        "before = run()\n"
        "from executorch.extension.llm.custom_ops import custom_ops\n"
        "import executorch.kernels.quantized\n"
        "from executorch.runtime import Runtime\n"
        "np.testing.assert_array_equal(run(), before)\n"
        "print('same result')\n"
        "try:\n"
        "    _native.Program(sys.argv[2], [], _native.Activations(), True)\n"
        "except _native.NativeError as error:\n"
        "    print(error.args[1])\n"
        "try:\n"
        "    Runtime.get().load_program('/elsewhere.pte')\n"
        "except RuntimeError:\n"
        "    pass\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, toy_bundle.base_program, toy_bundle.foundation]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_executorchs_own_operators_may_be_imported_beside_ours(
    beside_executorch: subprocess.CompletedProcess[str],
) -> None:
    """They have the same names; two kernels of one name in ExecuTorch's registry would abort the process."""
    assert "same result" in beside_executorch.stdout


def test_executorchs_own_bindings_go_on_logging_and_ours_stays_quiet(
    beside_executorch: subprocess.CompletedProcess[str],
) -> None:
    complaint = "Program identifier 'FT01' != expected 'ET12'"  # a data file, loaded as a program
    assert complaint in beside_executorch.stdout
    assert complaint not in beside_executorch.stderr
    assert "elsewhere.pte" in beside_executorch.stderr
