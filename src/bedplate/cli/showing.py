"""Commands that show what a bundle holds and prove what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bedplate.bundle import proof, usage
from bedplate.bundle.store import Bundle
from bedplate.cli.making import BundlePath
from bedplate.cli.output import print_json, print_table, progress_bars, size, stdout

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def list_adapters(bundle: BundlePath, as_json: Json = False) -> None:
    """List the adapters of a bundle."""
    entries = Bundle.open(bundle, check=False).adapters.values()
    sizes = {entry.name: entry.program.stat().st_size + entry.weights.stat().st_size for entry in entries}
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "rank": entry.info.rank,
                    "alpha": entry.info.alpha,
                    "dtype": entry.info.dtype,
                    "targets": entry.info.targets,
                    "bytes": sizes[entry.name],
                }
                for entry in entries
            ]
        )
        return
    rows = []
    for entry in entries:
        targets = ", ".join(target.split(".")[-1] for target in entry.info.targets)
        numbers = [str(entry.info.rank), f"{entry.info.alpha:g}", entry.info.dtype, size(sizes[entry.name])]
        rows.append([entry.name, *numbers, targets])
    print_table(
        f"{bundle}: {len(rows)} {'adapter' if len(rows) == 1 else 'adapters'}",
        ["name", ">rank", ">alpha", "dtype", ">size", "targets"],
        rows,
    )


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """List every constant of a bundle: name, dtype, shape, bytes, key, file, and the programs that use it."""
    constants = Bundle.open(bundle).constants()
    if as_json:
        print_json(constants)
        return
    columns = ["name", "dtype", "shape", ">bytes", "key", "in", "used by"]
    rows = [
        [
            c.name,
            c.dtype,
            "×".join(map(str, c.shape)),
            f"{c.nbytes:,}",
            c.key[:12],
            c.owner,
            ", ".join(c.users),
        ]
        for c in constants
    ]
    print_table(f"{bundle}: {len(constants)} constants", columns, rows)


def verify(
    bundle: BundlePath,
    as_json: Json = False,
    threads: Annotated[
        int | None,
        typer.Option(help="How many threads to use. Without this option: one for each physical core."),
    ] = None,
) -> None:
    """Prove that a bundle is whole and shared. This hashes every file, computes every key again from its bytes, finds
    every key that a program names, and compares each adapter with the base.

    The exit code is 2 if something is damaged or missing, and 1 if an adapter changes nothing.
    """
    from bedplate.runtime.effect import measure_effects
    from bedplate.runtime.engine import Engine

    opened = Bundle.open(bundle)  # hashes every file
    proof.check_keys(opened)
    sharing = usage.sharing(opened)
    with Engine(opened, threads=threads) as engine:
        engine.load()
        effects = measure_effects(engine)
    idle = [effect.name for effect in effects if not effect.took_effect]
    if as_json:
        print_json({"ok": not idle, "sharing": sharing, "effects": effects, "without_effect": idle})
    else:
        _show_verdict(opened, sharing, {effect.name: effect for effect in effects}, idle)
    if idle:
        raise typer.Exit(1)


def evaluate(
    bundle: BundlePath,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="Text file on which to measure.")],
    model: Annotated[
        Path, typer.Option("--model", metavar="MODEL", help="The model that the bundle was built from.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Adapter to measure. You can give it more than once. Without this option: all.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="How many threads to use. Without this option: one for each physical core."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what quantization costs. This compares base and adapters with the float model on a text."""
    from bedplate import api

    with progress_bars() as bars:
        found = api.evaluate(
            Bundle.open(bundle), model, text, adapters=adapter, threads=threads, reporter=bars
        )
    if as_json:
        print_json(found)
        return
    columns = ["program", ">NLL", ">float NLL", ">perplexity", ">float perplexity", ">mean KL", ">top-1 kept"]
    rows = [
        [
            *(one.name, f"{one.nll:.4f}", f"{one.float_nll:.4f}"),
            *(
                f"{one.perplexity:.2f}",
                f"{one.float_perplexity:.2f}",
                f"{one.mean_kl:.4f}",
                f"{one.top1:.1%}",
            ),
        ]
        for one in found
    ]
    print_table(f"{bundle} against {model}, {found[0].positions:,} positions of {text}", columns, rows)


def _show_verdict(
    opened: Bundle, sharing: usage.Sharing, effects: dict[str, object], idle: list[str]
) -> None:
    from bedplate.runtime.effect import Effect

    rows = []
    for use in sharing.programs:
        effect = effects.get(use.name)
        changed = ["", ""]
        if isinstance(effect, Effect):
            changed = [f"{effect.mean_kl:.4f}", f"{effect.top1_changed:.0%}"]
        rows.append([use.name, str(use.keys), size(use.from_foundation), size(use.own), *changed])
    columns = ["program", ">keys", ">from foundation", ">own", ">mean KL to base", ">top-1 changed"]
    print_table(f"{opened.path}: every file as it was written, every key proven and resolved", columns, rows)
    stdout.print(
        f"foundation {size(sharing.foundation)}, of which {size(sharing.shared)} serve two programs or more"
    )
    if idle:
        stdout.print(f"NOT OK: without effect: {', '.join(idle)}")
    else:
        stdout.print("OK")
