"""Tests of the runtime with the extension built under a sanitizer.

    python tests/sanitized.py address|thread [PYTEST ARGUMENTS | fuzz ARGUMENTS OF tests/fuzz.py]

Linux with GCC.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/native", "tests/runtime", "tests/test_fuzz.py"]
# Python frees little at exit; leaks of ours are what test_soak measures.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
}
# The sanitized module takes the place of the installed one before anything imports that.
RUN = """
import importlib.util, sys
import pytest
path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("bedplate._native", path)
sys.modules["bedplate._native"] = native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
if arguments[:1] == ["fuzz"]:
    sys.path.insert(0, "tests")
    import fuzz
    sys.argv = arguments
    sys.exit(fuzz.main())
sys.exit(pytest.main(["-p", "no:cacheprovider", *arguments]))
"""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in OPTIONS:
        raise SystemExit(__doc__)
    sanitizer, arguments = sys.argv[1], sys.argv[2:] or TESTS
    module = build(sanitizer)
    # libstdc++ too: the sanitizer looks for its functions when Python, which has none of it, starts.
    libraries = [{"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so.6"]
    preload = ":".join(where_is(library) for library in libraries)
    environment = {**os.environ, **OPTIONS[sanitizer], "LD_PRELOAD": preload}
    done = subprocess.run([sys.executable, "-c", RUN, str(module), *arguments], cwd=ROOT, env=environment)
    raise SystemExit(done.returncode)


def build(sanitizer: str) -> Path:
    """The path of the module, built in a folder of its own."""
    folder = ROOT / "build" / f"sanitized-{sanitizer}"
    settings = {
        "BEDPLATE_SANITIZE": sanitizer,
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "Python_EXECUTABLE": sys.executable,
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    # pip installs CMake beside Python, where PATH need not lead.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for arguments in (
        ["-S", ROOT / "native", "-B", folder, *definitions],
        ["--build", folder, "--target", "_native", "--parallel", "2"],
    ):
        subprocess.run(["cmake", *arguments], check=True, env=environment)
    return next(folder.glob("_native*.so"))


def where_is(library: str) -> str:
    words = ["gcc", f"-print-file-name={library}"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
