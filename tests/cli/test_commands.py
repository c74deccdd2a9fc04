"""Every command on a toy bundle: what goes to stdout and to stderr, and the exit code."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_formats import as_gguf
from command_line import Command, failed
from forged import flip, settle
from safetensors.numpy import load_file, save_file
from shared import Shared
from toy import is_in_programs, toy_config

import bedplate
from bedplate.bundle import usage


@pytest.fixture
def copy(toy_bundle: bedplate.Bundle, tmp_path: Path) -> Path:
    """A bundle to change, with three adapters."""
    return Path(shutil.copytree(toy_bundle.path, tmp_path / "copy.bundle"))


# --- Making ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy_bundle")  # has compiled what this needs
def test_build_add_list_remove(
    command: Command,
    toy_model: Path,
    toy_adapters: dict[str, Path],
    toy_bundle: bedplate.Bundle,
    unit_cache: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "new.bundle"
    built = command("build", toy_model, "-o", out, "--max-context", 128, "--unit-cache", unit_cache)
    assert (built.code, built.out) == (0, "")
    assert "quantize and pack" in built.err and f"built {out} in " in built.err
    assert (out / "foundation.ptd").read_bytes() == toy_bundle.foundation.read_bytes()
    assert command("list", out, "--json").json() == []

    added = command("add", out, toy_adapters["all"], "--name", "all", "--unit-cache", unit_cache)
    assert (added.code, added.out) == (0, "")
    assert "added all: rank 4, 1" in added.err and "1 adapter in " in added.err
    (listed,) = command("list", out, "--json").json()
    sizes = [(out / "adapters/all" / name).stat().st_size for name in ("program.pte", "weights.ptd")]
    assert listed["bytes"] == sum(sizes)
    assert (listed["name"], listed["rank"], listed["alpha"]) == ("all", 4, 8.0)
    assert (listed["dtype"], len(listed["targets"])) == ("8w", 7)

    file = as_gguf(toy_adapters["all2"], tmp_path / "other.v2.gguf", toy_config())
    assert "added other.v2: rank 4" in command("add", out, file, "--unit-cache", unit_cache).err
    assert command("remove", out, "other.v2").code == 0

    removed = command("remove", out, "all")
    assert (removed.code, removed.out, removed.err) == (0, "", "removed all\n")
    assert command("list", out, "--json").json() == []


def test_export(command: Command, toy_bundle: bedplate.Bundle, tmp_path: Path) -> None:
    plain, whole = tmp_path / "plain.pte", tmp_path / "whole.pte"
    assert command("export", toy_bundle.path, "-o", plain).out == ""
    assert plain.read_bytes() == toy_bundle.base_program.read_bytes()
    result = command("export", toy_bundle.path, "-o", whole, "--adapter", "all", "--with-foundation")
    assert result.code == 0 and result.err.startswith(f"wrote {whole}: ")
    assert whole.stat().st_size > toy_bundle.foundation.stat().st_size


@pytest.mark.usefixtures("toy_bundle")  # has filled the cache
def test_cache(command: Command, tmp_path: Path, shared: Shared) -> None:
    copied = shared.copy_units(tmp_path / "units")
    entries = command("cache", "list", "--unit-cache", copied, "--json").json()
    # Whether there are programs of fixed shapes depends on which tests ran before.
    assert {entry["kind"] for entry in entries} - {"static"} == {"units", "program"}
    assert sum(entry["bytes"] for entry in entries) == sum(file.stat().st_size for file in copied.iterdir())
    table = command("cache", "list", "--unit-cache", copied).out
    assert all(entry["fingerprint"] in table for entry in entries)
    assert "freed" in command("cache", "clear", "--unit-cache", copied).err
    assert command("cache", "list", "--unit-cache", copied, "--json").json() == []


# --- Showing --------------------------------------------------------------------------------------------------


def test_list_as_a_table(command: Command, toy_bundle: bedplate.Bundle) -> None:
    result = command("list", toy_bundle.path)
    assert (result.code, result.err) == (0, "")
    title, head, *rows = result.out.splitlines()
    assert title.strip() == f"{toy_bundle.path}: 3 adapters"
    assert head.split() == ["name", "rank", "alpha", "dtype", "size", "targets"]
    assert [row.split()[0] for row in rows] == ["all", "all2", "all8"]
    assert all("gate_proj" in row and "down_proj" in row for row in rows)


def test_inspect_lists_every_constant_in_full(command: Command, toy_bundle: bedplate.Bundle) -> None:
    constants = command("inspect", toy_bundle.path, "--json").json()
    assert len(constants) == len(usage.constants(toy_bundle))
    for constant in constants:
        assert constant.keys() == {"name", "dtype", "shape", "nbytes", "key", "owner", "users"}
        assert len(constant["key"]) == 64
        assert bool(constant["users"]) == is_in_programs(constant["name"])
    codes = next(c for c in constants if c["name"] == "layers.0.mlp.down_proj.weight#codes")
    assert (codes["dtype"], codes["shape"], codes["nbytes"]) == ("int4", [64, 96], 64 * 96 // 2)
    assert (codes["owner"], codes["users"]) == ("foundation", ["base", "all", "all2", "all8"])
    table = command("inspect", toy_bundle.path).out
    assert "…" not in table
    assert all(c["name"] in table and c["key"][:12] in table for c in constants)


def test_verify(command: Command, toy_bundle: bedplate.Bundle) -> None:
    result = command("verify", toy_bundle.path, "--json")
    assert (result.code, result.err) == (0, "")
    verdict = result.json()
    assert verdict["ok"] and verdict["without_effect"] == []
    assert [program["name"] for program in verdict["sharing"]["programs"]] == ["base", "all", "all2", "all8"]
    assert all(effect["max_difference"] > 0 for effect in verdict["effects"])
    assert command("verify", toy_bundle.path).out.endswith("\nOK\n")


def test_verify_names_an_adapter_without_effect(
    command: Command, copy: Path, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    idle = Path(shutil.copytree(toy_adapters["all"], tmp_path / "idle"))
    file = idle / "adapter_model.safetensors"
    save_file({name: value * ("lora_B" not in name) for name, value in load_file(file).items()}, file)
    add = ("add", copy, idle, "--name", "idle", "--unit-cache", unit_cache)
    failed(command(*add), f"{idle}: it changes nothing", "--allow-noop")
    assert command(*add, "--allow-noop").code == 0
    result = command("verify", copy, "--json")
    assert result.code == 1
    assert result.json()["without_effect"] == ["idle"] and not result.json()["ok"]
    assert "NOT OK: without effect: idle" in command("verify", copy).out


# --- Running --------------------------------------------------------------------------------------------------


def test_eval(command: Command, float_bundle: bedplate.Bundle, toy_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 5)
    arguments = ("eval", float_bundle.path, text, "--model", toy_model, "--adapter", "qv")
    result = command(*arguments)
    assert result.code == 0 and "mean KL" in result.out
    assert [line.split()[0] for line in result.out.splitlines()[2:]] == ["base", "qv"]
    found = command(*arguments, "--json").json()
    assert [one["name"] for one in found] == ["base", "qv"]
    assert abs(found[0]["mean_kl"]) < 1e-6
    failed(
        command("eval", float_bundle.path, tmp_path / "none.txt", "--model", toy_model),
        "no such file",
        "hint:",
    )


def test_run_prints_what_the_session_generates(command: Command, toy_bundle: bedplate.Bundle) -> None:
    with bedplate.Engine(toy_bundle) as engine:
        expected = engine.session("all").generate([{"role": "user", "content": "the fox"}], max_tokens=8)
    options = ("--adapter", "all", "--max-tokens", 8)
    result = command("run", toy_bundle.path, "-p", "the fox", *options)
    assert (result.code, result.out) == (0, expected + "\n")
    assert "8 generated" in result.err
    assert command("run", toy_bundle.path, "-p", "-", *options, stdin="the fox").out == expected + "\n"
    as_json = command("run", toy_bundle.path, "-p", "the fox", *options, "--json")
    assert as_json.json()["text"] == expected
    assert as_json.json()["statistics"]["generated_tokens"] == 8
    raw = command("run", toy_bundle.path, "-p", "the fox", *options, "--raw", "--json").json()
    assert raw["statistics"]["prompt_tokens"] < as_json.json()["statistics"]["prompt_tokens"]


def test_chat_switches_adapters_and_outlives_mistakes(command: Command, toy_bundle: bedplate.Bundle) -> None:
    lines = (
        "the fox",
        "/use all",
        "/reset",
        "the fox",
        "/use nosuch",
        "/what",
        "dog " * 400,
        "the dog",
        "/quit",
    )
    result = command("chat", toy_bundle.path, "--max-tokens", 4, "--temperature", 0, stdin="\n".join(lines))
    assert result.code == 0
    with bedplate.Engine(toy_bundle) as engine:
        answers, history = [], []
        for adapter, question, new in (
            (None, "the fox", True),
            ("all", "the fox", True),
            ("all", "the dog", False),
        ):
            history = [*([] if new else history), {"role": "user", "content": question}]
            answers.append(engine.session(adapter).generate(history, max_tokens=4))
            history.append({"role": "assistant", "content": answers[-1]})
    assert result.out == "".join(answer + "\n" for answer in answers)
    assert "no adapter 'nosuch'" in result.err and "hint: the bundle has: all, all2, all8" in result.err
    assert "do not fit the context of 256" in result.err
    assert "error: no command /what\nhint: " in result.err


# --- Without programs, and with them in ExecuTorch's own runtime ------------------------------------------------


def test_a_bundle_without_programs(
    command: Command,
    toy_model: Path,
    toy_adapters: dict[str, Path],
    toy_bundle: bedplate.Bundle,
    tmp_path: Path,
) -> None:
    out, units = tmp_path / "new.bundle", tmp_path / "units"
    rest = ("--no-programs", "--unit-cache", units)
    assert command("build", toy_model, "-o", out, "--max-context", 128, *rest).code == 0
    assert (out / "foundation.ptd").read_bytes() == toy_bundle.foundation.read_bytes()
    added = command("add", out, toy_adapters["all"], toy_adapters["qv"], *rest)
    assert added.code == 0 and "added qv: rank 8, " in added.err and "compile" not in added.err
    assert not units.exists() and not list(out.rglob("*.pte"))
    assert [one["name"] for one in command("list", out, "--json").json()] == ["all", "qv"]
    assert all(one["users"] == [] for one in command("inspect", out, "--json").json())
    verified = command("verify", out)
    assert verified.code == 0 and verified.out.endswith(", no programs\nOK\n")
    answer = command("run", out, "-p", "the fox", "--adapter", "qv", "--max-tokens", 4)
    assert answer.code == 0 and "generated" in answer.err
    again = f"bedplate build MODEL -o {out} --force, and bedplate add for each adapter"
    for args in (("export", out, "-o", tmp_path / "x.pte"), ("verify", out, "--programs")):
        failed(command(*args), f"{out}: the bundle has no program: it was made without", again)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    failed(command("eval", out, text, "--model", toy_model, "--programs"), "has no program", again)
    assert command("remove", out, "all").code == 0
    assert not (tmp_path / "x.pte").exists()


@pytest.mark.parametrize("bundle", ["float_bundle", "toy_bundle"])
def test_verify_runs_the_programs(command: Command, bundle: str, request: pytest.FixtureRequest) -> None:
    opened: bedplate.Bundle = request.getfixturevalue(bundle)
    verdict = command("verify", opened.path, "--programs", "--json").json()
    names = ["base", *opened.adapters]
    assert verdict["ok"] and [one["name"] for one in verdict["programs"]] == names
    for one in verdict["programs"]:
        assert one["from_ours"]["max_difference"] > 0
        assert one["from_ours"]["mean_kl"] < (1e-4 if bundle == "float_bundle" else 0.2)
        assert (one["effect"] is None) == (one["name"] == "base")
        assert one["effect"] is None or one["effect"]["mean_kl"] > 0.01
    table = command("verify", opened.path, "--programs").out
    assert "programs in ExecuTorch's own runtime" in table and table.endswith("\nOK\n")
    assert "programs" not in command("verify", opened.path, "--json").json()


def test_eval_runs_the_programs(
    command: Command, toy_bundle: bedplate.Bundle, toy_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 5)
    arguments = ("eval", toy_bundle.path, text, "--model", toy_model, "--adapter", "all8", "--json")
    ours, stock = command(*arguments).json(), command(*arguments, "--programs").json()
    assert [one["name"] for one in ours] == [one["name"] for one in stock] == ["base", "all8"]
    assert all(one["mean_kl"] != other["mean_kl"] for one, other in zip(ours, stock, strict=True))


@pytest.mark.parametrize("kv", ["float16", "float32"])
def test_run_takes_the_choices_of_the_engine(command: Command, toy_bundle: bedplate.Bundle, kv: str) -> None:
    with bedplate.Engine(toy_bundle, kv=kv) as engine:  # type: ignore[arg-type]
        expected = engine.session("all").generate("the fox", max_tokens=8)
    options = ("--raw", "--adapter", "all", "--max-tokens", 8, "--kv", kv)
    assert command("run", toy_bundle.path, "-p", "the fox", *options).out == expected + "\n"
    failed(
        command("run", toy_bundle.path, "-p", "the fox", *options, "--max-context", 1),
        "do not fit the context of 1",
        "max_context",
    )
    failed(command("run", toy_bundle.path, "-p", "x", "--max-context", 257), "the model has 256 positions")


# --- Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list", "inspect", "verify", "run", "chat", "remove", "add", "export"])
def test_not_a_bundle(command: Command, tmp_path: Path, name: str) -> None:
    rest = {"run": ("-p", "x"), "remove": ("x",), "add": (tmp_path, "--name", "x"), "export": ("-o", "x.pte")}
    failed(command(name, tmp_path, *rest.get(name, ())), str(tmp_path), "bundle.json", "bedplate build")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ("run", "BUNDLE", "-p", "x", "--adapter", "nosuch"),
        ("chat", "BUNDLE", "--adapter", "nosuch"),
        ("export", "BUNDLE", "-o", "TMP/x.pte", "--adapter", "nosuch"),
        ("remove", "BUNDLE", "nosuch"),
    ],
    ids=lambda args: args[0],
)
def test_no_such_adapter(command: Command, copy: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    filled = [arg.replace("BUNDLE", str(copy)).replace("TMP", str(tmp_path)) for arg in args]
    failed(command(*filled), "no adapter 'nosuch'", "the bundle has: all, all2, all8")


def test_bad_input_to_build(
    command: Command, toy_model: Path, toy_bundle: bedplate.Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "new.bundle"
    failed(command("build", tmp_path / "nowhere", "-o", out), "nowhere")
    failed(command("build", toy_model, "-o", out, "--group-size", 33), "group size 33")
    failed(command("build", toy_model, "-o", out, "--override", "lm_head"), "PATTERN=SCHEME")
    failed(command("build", toy_model, "-o", out, "--override", "lm_head=2bit"), "2bit", "8da4w, 8da8w, none")
    failed(command("build", toy_model, "-o", out, "--target-kl", 0.1, "--bytes-per-weight", 0.7), "give one")
    failed(command("build", toy_model, "-o", out, "--target-kl", 0), "positive")
    failed(command("build", toy_model, "-o", out, "--max-context", 100_000), "--max-context")
    for wrong in ("64", "64,", "a,b", "-1,1", "64,1,1", "9" * 5000 + ",1"):
        failed(command("build", toy_model, "-o", out, "--static-shapes", wrong), "PREFILL,DECODE")
    failed(command("build", toy_model, "-o", out, "--static-shapes", "0,1"), "a call of 0 tokens")
    failed(command("build", toy_model, "-o", out, "--static-shapes", "8,1", "--no-programs"), "leave out")
    failed(command("build", toy_model, "-o", out, "--split-heads"), "--static-shapes")
    failed(
        command("build", toy_model, "-o", toy_bundle.path, "--max-context", 128), "exists already", "--force"
    )
    failed(command("build", toy_model, "-o", tmp_path / "no" / "x", "--max-context", 128), "no such folder")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_add(
    command: Command, copy: Path, toy_adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = (copy / "bundle.json").read_bytes()
    failed(command("add", copy, toy_adapters["all"], "--name", "all"), "'all' already", "bedplate remove")
    failed(command("add", copy, toy_adapters["all"], "--name", "../x"), "cannot be the name of an adapter")
    failed(command("add", copy, tmp_path, "--name", "new"), str(tmp_path), "adapter_config.json")
    assert (copy / "bundle.json").read_bytes() == before
    assert sorted(path.name for path in (copy / "adapters").iterdir()) == ["all", "all2", "all8"]


def test_no_check_reads_no_more_than_it_needs(command: Command, copy: Path) -> None:
    weights = copy / "adapters/all2/weights.ptd"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    for args in (
        ("run", copy, "-p", "x", "--max-tokens", 2),
        ("chat", copy),
        ("bench", copy, "--prompt", 4, "--answer", 2, "--batch", 1, "--position", 0, "--runs", 1),
    ):
        failed(command(*args), str(weights), "SHA-256")
        assert command(*args, "--no-check").code == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("prompt", 0, "the length of a prompt is 0"),
        ("answer", 0, "the number of tokens of an answer is 0"),
        ("batch", 0, "the number of sessions is 0"),
        ("position", -1, "the position is -1"),
        ("runs", 0, "the number of runs is 0"),
        ("position", 200, "264 positions do not fit the context of 256"),
    ],
)
def test_bad_input_to_bench(
    command: Command, toy_bundle: bedplate.Bundle, option: str, value: int, words: str
) -> None:
    failed(command("bench", toy_bundle.path, f"--{option}", value), words)


def test_bad_input_to_run(command: Command, toy_bundle: bedplate.Bundle) -> None:
    failed(command("run", toy_bundle.path, "-p", "dog " * 400), "do not fit the context of 256")
    failed(command("run", toy_bundle.path, "-p", "x", "--temperature", -1), "temperature")
    for option in ("min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        failed(command("run", toy_bundle.path, "-p", "x", f"--{option}", -3), option.replace("-", "_"))
    failed(command("run", toy_bundle.path, "-p", "x", "--max-tokens", 0), "max_tokens")
    failed(command("run", toy_bundle.path, "-p", "x", "--threads", 0), "threads")
    failed(command("run", toy_bundle.path, "-p", "", "--raw"), "empty")


def test_a_damaged_file_is_named(command: Command, copy: Path) -> None:
    weights = copy / "adapters/all2/weights.ptd"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    failed(command("verify", copy), str(weights), "SHA-256", f"bedplate remove {copy} all2")
    failed(command("run", copy, "-p", "x"), str(weights))
    assert command("remove", copy, "all2").code == 0
    assert command("verify", copy).code == 0


def test_an_adapter_is_not_added_to_a_damaged_base(
    command: Command, copy: Path, toy_adapters: dict[str, Path]
) -> None:
    """It looks at no other adapter: that would take longer with each."""
    opened = bedplate.Bundle.open(copy)
    flip(opened.adapters["all2"].weights, opened.adapters["all2"].info.constants[0].key)
    adapter = next(iter(toy_adapters.values()))
    assert command("add", copy, adapter, "--name", "beside", "--no-programs").code == 0
    flip(opened.foundation, opened.foundation_info.constants[0].key)
    before = (copy / "bundle.json").read_bytes()
    result = command("add", copy, adapter, "--name", "late", "--no-programs")
    failed(result, str(opened.foundation), "SHA-256", "--force")
    assert (copy / "bundle.json").read_bytes() == before and not (copy / "adapters/late").exists()


def test_verify_refuses_other_bytes_under_a_key(command: Command, copy: Path) -> None:
    """Also where every hash and digest fits."""
    opened = bedplate.Bundle.open(copy)
    info = next(c for c in opened.foundation_info.constants if c.name == "layers.0.mlp.up_proj.weight#codes")
    flip(opened.foundation, info.key)
    settle(copy)
    assert command("list", copy).code == 0
    failed(command("verify", copy), str(opened.foundation), info.name, "is not what its key says", "--force")


def test_usage_errors_end_with_exit_code_2(command: Command, tmp_path: Path) -> None:
    for args in (
        ("build", "x"),
        ("build", "x", "-o", "y", "--quantize", "4bit"),
        ("nosuch",),
        ("list", "x", "--y"),
    ):
        result = command(*args)
        assert (result.code, result.out) == (2, "")
        assert "Error: " in result.err and "--help" in result.err


def test_a_file_that_cannot_be_written_is_an_error_in_words(
    command: Command, toy_bundle: bedplate.Bundle, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        result = command("export", toy_bundle.path, "-o", tmp_path / "x.pte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed(result, f"{tmp_path / 'x.pte'}: File too large")
    assert list(tmp_path.iterdir()) == []


# --- The real command, in a process of its own ------------------------------------------------------------------

EXECUTABLE = Path(sys.executable).with_name("bedplate")


@pytest.mark.usefixtures("toy_bundle")
def test_a_build_says_nothing_but_its_stages(toy_model: Path, unit_cache: Path, tmp_path: Path) -> None:
    args = [
        EXECUTABLE,
        "build",
        toy_model,
        "-o",
        tmp_path / "b",
        "--max-context",
        "128",
        "--unit-cache",
        unit_cache,
    ]
    result = subprocess.run(args, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    *stages, built = result.stderr.splitlines()
    assert stages == ["import torch …", "quantize and pack …"]
    assert built.startswith(f"built {tmp_path / 'b'} in ")


@pytest.mark.usefixtures("toy_bundle")  # has compiled what this needs
def test_the_context_is_what_the_model_has_where_that_is_less(
    command: Command, toy_model: Path, unit_cache: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "max_position_embeddings": 128}))
    assert command("build", model, "-o", tmp_path / "b", "--unit-cache", unit_cache).code == 0
    built = bedplate.Bundle.open(tmp_path / "b")
    assert built.manifest.model["max_context"] == 128
    with bedplate.Engine(built) as engine:
        assert engine.limits.max_context == 128


def test_a_full_disk_behind_stdout_is_an_error(toy_bundle: bedplate.Bundle) -> None:
    with Path("/dev/full").open("w") as full:
        args = [EXECUTABLE, "inspect", toy_bundle.path, "--json"]
        result = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: No space left on device\nhint: ")


def test_a_reader_that_goes_away_is_no_error(toy_bundle: bedplate.Bundle) -> None:
    script = f'set -o pipefail; "{EXECUTABLE}" inspect "{toy_bundle.path}" --json | head -n 1'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[\n", "")
