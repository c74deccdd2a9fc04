"""Bundles on disk: what is written is found, what is damaged is named, and nothing is ever there by half."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_bundle import FOUNDATION, MODEL, NORM, adapter_writer, constant, program, write_base

from bedplate.bundle import files, manifest
from bedplate.bundle.facts import AdapterFacts, BundleFacts
from bedplate.bundle.manifest import Manifest
from bedplate.bundle.ptd import write_ptd
from bedplate.bundle.store import Bundle, create_bundle, remove_adapter
from bedplate.constants import Constant
from bedplate.errors import AdapterError, BundleError, LoweringError, NameTakenError, NotFoundError

FILES = [
    "bundle.json",
    "foundation.ptd",
    "foundation.json",
    "base.pte",
    "tokenizer.json",
    "chat_template.jinja",
    "adapters/one/program.pte",
    "adapters/one/weights.ptd",
    "adapters/one/adapter.json",
]


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def tree_of_adapters(*names: str) -> list[str]:
    own = [f"adapters/{name}/{file.rpartition('/')[2]}" for name in names for file in FILES[6:]]
    return [*FILES[:6], files.LOCK, *own]


def test_opens_what_was_created(bundle: Bundle) -> None:
    opened = Bundle.open(str(bundle.path))
    assert opened.manifest == bundle.manifest
    assert opened.manifest.model == MODEL
    assert (opened.manifest.tokenizer.bos_id, opened.manifest.tokenizer.eos_ids) == (1, (2,))
    assert opened.base_program.read_bytes().startswith(b"ET12")
    assert opened.tokenizer_file.read_text() == "{}\n"
    assert opened.chat_template_file == bundle.path / "chat_template.jinja"
    assert opened.adapters == bundle.adapters
    assert opened.adapters["one"].info.rank == 4
    assert opened.adapters["one"].weights.is_file()
    assert opened.adapters["one"].program.is_file()


def test_a_bundle_without_a_chat_template(tmp_path: Path) -> None:
    def write(folder: Path) -> BundleFacts:
        facts = write_base(folder)
        (folder / "chat_template.jinja").unlink()
        return facts

    assert create_bundle(tmp_path / "a.bundle", write).chat_template_file is None


def test_built_twice_every_file_is_the_same(tmp_path: Path) -> None:
    trees = []
    for name in ("a.bundle", "b.bundle"):
        made = create_bundle(tmp_path / name, write_base)
        made.add_adapters({"one": adapter_writer(made, "one", 10)})
        trees.append(tree(made.path))
    assert trees[0] == trees[1]
    assert set(trees[0]) == {*FILES, files.LOCK}


def test_the_foundation_is_the_same_whatever_adapters_there_are(bundle: Bundle) -> None:
    before = bundle.foundation.read_bytes()
    bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)})
    bundle.remove_adapter("one")
    assert bundle.foundation.read_bytes() == before
    assert list(Bundle.open(bundle.path).adapters) == ["three", "two"]
    assert not (bundle.path / "adapters" / "one").exists()


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_found(bundle: Bundle, name: str) -> None:
    """Every byte of the small files, and every 7th of the others."""
    path = bundle.path / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 1 if len(whole) < 200 else 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle.path)
        assert str(caught.value.where).startswith(str(path))
        assert caught.value.hint
    path.write_bytes(whole)
    Bundle.open(bundle.path)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found_without_hashing(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path, check=False)
    assert str(caught.value.where).startswith(str(path))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_found_without_hashing(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match="missing") as caught:
        Bundle.open(bundle.path, check=False)
    assert caught.value.where == str(bundle.path / name)


def test_several_damaged_files_are_all_named(bundle: Bundle) -> None:
    (bundle.path / "base.pte").unlink()
    (bundle.path / "adapters/one/weights.ptd").write_bytes(b"")
    with pytest.raises(BundleError, match=r"2 files .*base\.pte.*adapters/one/weights\.ptd") as caught:
        Bundle.open(bundle.path)
    assert "bedplate build" in str(caught.value.hint)
    assert "bedplate remove" in str(caught.value.hint)


def test_not_a_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotFoundError, match="not a bundle"):
            Bundle.open(path)
        with pytest.raises(NotFoundError, match="not a bundle"):
            remove_adapter(path, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_create_where_something_is(bundle: Bundle, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(NameTakenError, match="exists already") as caught:
        create_bundle(bundle.path, write_base)
    assert "--force" in str(caught.value.hint)
    (tmp_path / "home").mkdir()
    with pytest.raises(NameTakenError, match="is not a bundle"):
        create_bundle(tmp_path / "home", write_base, replace=True)
    with pytest.raises(NotFoundError, match="no such folder"):
        create_bundle(tmp_path / "none" / "a.bundle", write_base)
    assert tree(tmp_path) == before


def test_a_manifest_that_is_none_is_not_read(tmp_path: Path) -> None:
    """A pipe would be waited for, and a large file would take all memory."""
    os.mkfifo(tmp_path / "bundle.json")
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").unlink()
    with (tmp_path / "bundle.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="it has 1099511627776 bytes, more than 67108864"):
        Bundle.open(tmp_path)


def test_replace_a_bundle_even_a_damaged_one(bundle: Bundle, tmp_path: Path) -> None:
    bundle.base_program.write_bytes(b"")
    made = create_bundle(bundle.path, write_base, replace=True)
    assert Bundle.open(bundle.path).manifest == made.manifest
    assert made.adapters == {}
    assert [p.name for p in tmp_path.iterdir()] == ["toy.bundle"]


def test_swap_where_the_system_has_no_exchange(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    files.swap_in_steps(tmp_path / "a", tmp_path / "b")
    assert set(tree(tmp_path)) == {"a/b", "b/a"}


@pytest.mark.parametrize("name", ["", "base", ".hidden", "a/b", "..", "-x", "a b", "ä"])
def test_a_bad_name_for_an_adapter(bundle: Bundle, name: str) -> None:
    before = tree(bundle.path)
    with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
        bundle.add_adapters({name: adapter_writer(bundle, name, 30)})
    assert tree(bundle.path) == before


def test_a_name_already_taken(bundle: Bundle) -> None:
    before = tree(bundle.path)
    with pytest.raises(NameTakenError, match="'one' already"):
        bundle.add_adapters({"one": adapter_writer(bundle, "one", 30)})
    assert tree(bundle.path) == before


def test_a_name_taken_while_the_adapter_was_written(bundle: Bundle) -> None:
    def write(folder: Path) -> AdapterFacts:
        Bundle.open(bundle.path).add_adapters({"three": adapter_writer(bundle, "three", 30)})
        return adapter_writer(bundle, "three", 40)(folder)

    with pytest.raises(NameTakenError, match="'three' already"):
        bundle.add_adapters({"three": write})
    assert Bundle.open(bundle.path).adapters["three"].info.constants[0].name == "q_proj.lora_a"


def other_base(folder: Path) -> BundleFacts:
    """A base with another foundation."""
    facts = write_base(folder)
    return dataclasses.replace(facts, constants=write_ptd(folder / "foundation.ptd", FOUNDATION[:2]))


def test_the_bundle_is_replaced_while_the_adapter_is_written(bundle: Bundle) -> None:
    def write(folder: Path) -> AdapterFacts:
        facts = adapter_writer(bundle, "three", 30)(folder)
        create_bundle(bundle.path, write_base, replace=True)
        return facts

    with pytest.raises(BundleError, match="replaced at the same time"):
        bundle.add_adapters({"three": write})
    assert list(Bundle.open(bundle.path).adapters) == []


def test_the_bundle_was_replaced_since_it_was_opened(bundle: Bundle) -> None:
    create_bundle(bundle.path, other_base, replace=True)
    with pytest.raises(BundleError, match="replaced at the same time"):
        bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)})
    assert list(Bundle.open(bundle.path).adapters) == []


def test_add_refuses_an_adapter_for_another_foundation(bundle: Bundle) -> None:
    before = tree(bundle.path)
    with pytest.raises(AdapterError, match="packed against the foundation cccccccccccc…"):
        bundle.add_adapters({"three": adapter_writer(bundle, "three", 30, foundation="c" * 64)})
    assert tree(bundle.path) == before


def test_add_refuses_a_key_that_the_foundation_holds(bundle: Bundle) -> None:
    """Equal bytes on both sides of the border: ExecuTorch would refuse to load the two files together."""
    before = tree(bundle.path)
    own = (NORM, constant("q_proj.lora_a", 30))
    with pytest.raises(AdapterError, match=r"1 of its constants are in the foundation already, norm\.weight"):
        bundle.add_adapters({"three": adapter_writer(bundle, "three", 30, own)})
    assert tree(bundle.path) == before


@pytest.mark.parametrize(
    "named",
    [(*FOUNDATION, constant("q_proj.lora_a", 30)), FOUNDATION, (constant("elsewhere", 9), NORM)],
    ids=["one unused", "all unused", "one nowhere"],
)
def test_add_refuses_a_program_whose_constants_are_others(
    bundle: Bundle, named: tuple[Constant, ...]
) -> None:
    def write(folder: Path) -> AdapterFacts:
        facts = adapter_writer(bundle, "three", 30)(folder)
        (folder / "program.pte").write_bytes(program(named))
        return facts

    before = tree(bundle.path)
    with pytest.raises(LoweringError, match="do not fit each other"):
        bundle.add_adapters({"three": write})
    assert tree(bundle.path) == before


def test_a_check_sees_new_adapters_before_anybody_else(bundle: Bundle) -> None:
    def check(drafts: Bundle) -> None:
        assert list(drafts.adapters) == ["three"] and drafts.foundation == bundle.foundation
        assert drafts.adapters["three"].program.is_file()
        assert list(Bundle.open(bundle.path).adapters) == ["one", "two"]
        raise AdapterError("not this one")

    before = tree(bundle.path)
    with pytest.raises(AdapterError, match="not this one"):
        bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)}, check=check)
    assert tree(bundle.path) == before


def test_chat_settings_are_the_adapters_own_as_far_as_it_has_some(bundle: Bundle) -> None:
    def write(folder: Path) -> AdapterFacts:
        (folder / "chat_template.jinja").write_text("own")
        return adapter_writer(bundle, "three", 30)(folder)

    bundle.add_adapters({"three": write})
    bundle.add_adapters({"four": adapter_writer(bundle, "four", 40, special_tokens={"bos_token": "<b>"})})
    opened = Bundle.open(bundle.path)
    base, one, three, four = map(opened.chat_settings, (None, "one", "three", "four"))
    assert base == one and base.template_file == bundle.path / "chat_template.jinja"
    assert three.template_file == opened.adapters["three"].folder / "chat_template.jinja"
    assert (three.special_tokens, four.special_tokens) == ({"bos_token": "<s>"}, {"bos_token": "<b>"})
    assert four.template_file == base.template_file
    (opened.adapters["three"].folder / "chat_template.jinja").write_text("OWN")
    with pytest.raises(BundleError, match="SHA-256"):
        Bundle.open(bundle.path)


def test_an_adapter_copied_from_another_bundle(bundle: Bundle, tmp_path: Path) -> None:
    other = create_bundle(tmp_path / "other.bundle", other_base)
    shutil.copytree(bundle.path / "adapters" / "one", other.path / "adapters" / "one")
    assert Bundle.open(other.path).adapters == {}

    records = {"one": bundle.manifest.adapters["one"]}
    for record in (records["one"], dataclasses.replace(records["one"], foundation=other.foundation_sha256)):
        edited = dataclasses.replace(other.manifest, adapters={"one": record})
        (other.path / "bundle.json").write_bytes(manifest.dump(edited))
        with pytest.raises(BundleError, match="packed against another foundation") as caught:
            Bundle.open(other.path)
        assert caught.value.where == str(other.path / "adapters/one/adapter.json")


def test_a_renamed_adapter_folder(bundle: Bundle) -> None:
    (bundle.path / "adapters/one").rename(bundle.path / "adapters/uno")
    records = {"uno": bundle.manifest.adapters["one"]}
    edited = dataclasses.replace(bundle.manifest, adapters=records)
    (bundle.path / "bundle.json").write_bytes(manifest.dump(edited))
    with pytest.raises(BundleError, match="describes the adapter 'one'"):
        Bundle.open(bundle.path)


def test_remove_a_damaged_adapter(bundle: Bundle) -> None:
    (bundle.path / "adapters/one/program.pte").unlink()
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)
    remove_adapter(bundle.path, "one")
    assert list(Bundle.open(bundle.path).adapters) == ["two"]


def test_remove_what_is_not_there(bundle: Bundle) -> None:
    before = tree(bundle.path)
    with pytest.raises(NotFoundError, match="no adapter 'three'") as caught:
        bundle.remove_adapter("three")
    assert caught.value.hint == "the bundle has: one, two"
    assert tree(bundle.path) == before


def test_a_failing_writer_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    def fail(folder: Path) -> AdapterFacts:
        (folder / "program.pte").write_bytes(b"half")
        raise AdapterError("shapes do not fit")

    before = tree(tmp_path)
    with pytest.raises(AdapterError, match="do not fit"):
        bundle.add_adapters({"three": fail})
    with pytest.raises(AdapterError, match="do not fit"):
        create_bundle(tmp_path / "b.bundle", fail)  # type: ignore[arg-type]
    assert tree(tmp_path) == before
    assert sorted(p.name for p in (bundle.path / "adapters").iterdir()) == ["one", "two"]


# Each is a program for a process that is killed at the point that it names.
KILLED = {
    "create, while writing": """
def write(folder):
    (folder / "foundation.ptd").write_bytes(b"half")
    die()
create_bundle(root / "new.bundle", write)
""",
    "create, before the rename": """
files.rename_new = lambda *_: die()
create_bundle(root / "new.bundle", write_base)
""",
    "replace, before the exchange": """
files.swap = lambda *_: die()
create_bundle(root / "toy.bundle", write_base, replace=True)
""",
    "replace, after the exchange": """
swap = files.swap
def swap_and_die(*paths):
    swap(*paths)
    die()
files.swap = swap_and_die
create_bundle(root / "toy.bundle", write_base, replace=True)
""",
    "add, while writing": """
def write(folder):
    (folder / "program.pte").write_bytes(b"half")
    die()
Bundle.open(root / "toy.bundle").add_adapters({"three": write})
""",
    "add, between the folder and the manifest": """
bundle = Bundle.open(root / "toy.bundle")
store._write_manifest = lambda *_: die()
bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)})
""",
    "add several, between the folders": """
bundle = Bundle.open(root / "toy.bundle")
rename = Path.rename
def rename_once(path, target):
    Path.rename = lambda *_: die()
    return rename(path, target)
Path.rename = rename_once
bundle.add_adapters({name: adapter_writer(bundle, name, 30) for name in ("three", "four")})
""",
    "add, while writing the manifest": """
bundle = Bundle.open(root / "toy.bundle")
Path.replace = lambda *_: die()
bundle.add_adapters({"three": adapter_writer(bundle, "three", 30)})
""",
    "remove, between the manifest and the folder": """
store.files.remove_tree = lambda *_, **__: die()
store.remove_adapter(root / "toy.bundle", "one")
""",
}


@pytest.mark.parametrize("point", KILLED)
def test_killed_at_any_point(bundle: Bundle, tmp_path: Path, point: str) -> None:
    """No damaged bundle is visible, and the next commands succeed and clear away what was left."""
    start = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from toy_bundle import adapter_writer, write_base
from bedplate.bundle import files, store
from bedplate.bundle.store import Bundle, create_bundle
root = Path({str(tmp_path)!r})
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""
    before = Bundle.open(bundle.path).manifest
    killed = subprocess.run([sys.executable, "-c", start + KILLED[point]], check=False)
    assert killed.returncode == -signal.SIGKILL
    now = Bundle.open(bundle.path)
    kept = {"replace, after the exchange": [], "remove, between the manifest and the folder": ["two"]}
    assert list(now.adapters) == kept.get(point, ["one", "two"])
    assert now.manifest.files == before.files
    assert not (tmp_path / "new.bundle").exists()

    for name in {"one", "two", "three"} - now.adapters.keys():
        now.add_adapters({name: adapter_writer(bundle, name, 30)})
    assert list(Bundle.open(bundle.path).adapters) == ["one", "three", "two"]
    assert set(tree(bundle.path)) == set(tree_of_adapters("one", "two", "three"))
    create_bundle(tmp_path / "new.bundle", write_base)
    create_bundle(bundle.path, write_base, replace=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.bundle", "toy.bundle"]


def add_in_turn(path: Path, worker: int) -> None:
    for i in range(4):
        opened = Bundle.open(path)
        name = f"w{worker}-{i}"
        opened.add_adapters({name: adapter_writer(opened, name, 10 + 10 * worker + i)})


def test_parallel_adds_lose_nothing(bundle: Bundle) -> None:
    """Three processes add four adapters each while a reader opens the bundle over and over."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_in_turn, args=(bundle.path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        Bundle.open(bundle.path)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    expected = {"one", "two", *(f"w{worker}-{i}" for worker in range(3) for i in range(4))}
    assert Bundle.open(bundle.path).adapters.keys() == expected
    assert {p.name for p in (bundle.path / "adapters").iterdir()} == expected


def test_a_running_writer_is_not_taken_for_a_leftover(bundle: Bundle) -> None:
    def write(folder: Path) -> AdapterFacts:
        facts = adapter_writer(bundle, "three", 30)(folder)
        Bundle.open(bundle.path).add_adapters({"four": adapter_writer(bundle, "four", 40)})
        return facts

    bundle.add_adapters({"three": write})
    assert list(Bundle.open(bundle.path).adapters) == ["four", "one", "three", "two"]


def test_the_manifest_says_what_lies_on_disk(bundle: Bundle) -> None:
    text = json.loads((bundle.path / "bundle.json").read_text())
    assert (text["format"], text["version"]) == ("bedplate bundle", manifest.VERSION)
    assert text["adapters"]["one"]["foundation"] == text["files"]["foundation.ptd"]["sha256"]
    assert text["tokenizer"]["sha256"] == text["files"]["tokenizer.json"]["sha256"]
    assert text["files"]["base.pte"]["size"] == bundle.base_program.stat().st_size
    assert isinstance(bundle.manifest, Manifest)


def test_without_checks_an_adapter_is_described_when_asked_for(bundle: Bundle) -> None:
    """Whoever only runs a bundle with many adapters does not wait for the names of all their constants."""
    file = bundle.path / "adapters/one/adapter.json"
    file.write_text("{" * file.stat().st_size)
    opened = Bundle.open(bundle.path, check=False)
    assert opened.adapters["one"].weights.exists()
    with pytest.raises(BundleError) as caught:
        _ = opened.adapters["one"].info
    assert caught.value.where == str(file)
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)
