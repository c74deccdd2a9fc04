"""The layers of docs/architecture.md: who may import whom, and who may not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bedplate

SOURCES = Path(bedplate.__file__).parent
LEAVES = ("background", "constants", "errors", "executorch_1_5", "hashing", "names", "quiet", "spec")
EXTENSIONS = ("_native", "_oracle")
LAYERS = (
    "spec_check",
    "model",
    "quantize",
    "compile",
    "link",
    "bundle",
    "oracle",
    "runtime",
    "assemble",
    "api",
    "serve",
    "deploy",
    "cli",
)
# What a device that only runs bundles imports.
RUN_ONLY = {
    "bundle": {"constants", "errors", "hashing", "names", "spec"},
    "oracle": {"bundle", "errors", "quiet", "_oracle"},
    "runtime": {
        "background",
        "bundle",
        "constants",
        "errors",
        "hashing",
        "names",
        "spec",
        "spec_check",
        "_native",
    },
    "serve": {"bundle", "errors", "runtime"},
}


def imports(file: Path) -> Iterator[str]:
    """The parts of bedplate that a file imports, also in functions and for type checkers: `link`, `errors`."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from bedplate import api` names a part in its list, `from bedplate.api import Bundle` before it.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "bedplate":
                yield rest.split(".")[0] or "api"  # `import bedplate` has its names


def parts() -> dict[str, set[str]]:
    """Each part of bedplate → the parts that it imports."""
    found: dict[str, set[str]] = {}
    for file in SOURCES.rglob("*.py"):
        part = file.relative_to(SOURCES).parts[0].removesuffix(".py")
        found.setdefault(part, set()).update(imports(file))
    return {part: imported - {part} for part, imported in found.items() if part != "__init__"}


def test_every_part_has_its_place() -> None:
    assert parts().keys() == {*LEAVES, *LAYERS}


@pytest.mark.parametrize("part", LEAVES)
def test_a_leaf_imports_nothing_of_bedplate(part: str) -> None:
    assert parts()[part] == set()


@pytest.mark.parametrize("part", LAYERS)
def test_a_layer_imports_only_to_its_left(part: str) -> None:
    allowed = {*LEAVES, *EXTENSIONS, *LAYERS[: LAYERS.index(part)]}
    assert parts()[part] <= allowed


@pytest.mark.parametrize("part", RUN_ONLY)
def test_what_runs_bundles_does_not_import_what_builds_them(part: str) -> None:
    assert parts()[part] <= RUN_ONLY[part]


@pytest.mark.parametrize(
    "module",
    [
        "bedplate",
        "bedplate.bundle.store",
        "bedplate.runtime.engine",
        "bedplate.link.linker",
        "bedplate.serve.app",
        "bedplate.oracle",
        "bedplate.assemble",
        "bedplate.api",
        "bedplate.cli.running",
        "bedplate.cli.main",
    ],
)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'executorch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"


def test_a_session_imports_what_it_takes_long_to_import_only_where_it_is_used() -> None:
    """Tasks, numpy and OpenSSL (which asyncio loads too) take as long as a small model, or 10 MB."""
    code = "import sys, bedplate.runtime.engine; print({'asyncio', 'ssl', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_a_command_imports_nothing_of_the_others(toy_bundle: bedplate.Bundle) -> None:
    code = f"""
import sys
from bedplate.cli.main import app
app(["list", {str(toy_bundle.path)!r}, "--json"], standalone_mode=False)
others = {{"making", "running", "serving"}}
sys.exit(not others.isdisjoint(name.rpartition(".")[2] for name in sys.modules if name.startswith("bedplate.cli.")))
"""
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_adding_an_adapter_of_a_known_structure_and_running_it_import_neither_torch_nor_executorch(
    toy_bundle: bedplate.Bundle, toy_adapters: dict[str, Path], unit_cache: Path, tmp_path: Path
) -> None:
    script = """
import shutil, sys
import bedplate
bundle, copy, adapter, cache = sys.argv[1:]
opened = bedplate.Bundle.open(shutil.copytree(bundle, copy))
opened.add(adapter, name="new", quantize="none", unit_cache=cache)
opened.add(adapter, name="new8", quantize="8w", unit_cache=cache)
opened.add(adapter, name="without", programs=False)
with bedplate.Engine(opened) as engine:
    for name in (None, "new", "new8", "without"):
        engine.session(name).generate("the fox", max_tokens=2)
print("torch" in sys.modules, "executorch" in sys.modules)
"""
    args = [toy_bundle.path, tmp_path / "copy", toy_adapters["all"], unit_cache]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False False\n"


def test_generating_with_the_base_imports_neither_numpy_nor_openssl(
    toy_bundle: bedplate.Bundle,
) -> None:
    """numpy takes 17 MB, and longer to import than a step takes. OpenSSL takes 3 MB."""
    script = """
import sys, bedplate
with bedplate.Engine(bedplate.Bundle.open(sys.argv[1], check=False)) as engine:
    engine.session().generate("the fox", max_tokens=2)
    list(engine.session().events("the fox", max_tokens=2, temperature=1.0, top_p=0.9, logprobs=2))
    print({"numpy", "_hashlib"} & sys.modules.keys())
    engine.session(min(engine.bundle.adapters)).generate("the fox", max_tokens=2)
    print("numpy" in sys.modules)
"""
    command = [sys.executable, "-c", script, str(toy_bundle.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\nFalse\n"
