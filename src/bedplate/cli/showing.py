"""Commands that show what a bundle holds and prove what it claims."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bedplate.bundle import usage
from bedplate.bundle.store import Bundle
from bedplate.cli.options import BundlePath, KvPrecision, NoCheck, Threads
from bedplate.cli.output import print_json, print_table, progress_bars, size, stdout

if TYPE_CHECKING:
    from bedplate.assemble.verify import Verdict

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def list_adapters(bundle: BundlePath, as_json: Json = False) -> None:
    """List the adapters of a bundle."""
    entries = Bundle.open(bundle, check=False).adapters.values()
    sizes = {entry.name: entry.nbytes for entry in entries}
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "rank": entry.info.rank,
                    "alpha": entry.info.alpha,
                    "dtype": entry.info.dtype,
                    "targets": entry.info.targets,
                    "invocation": entry.info.invocation,
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
    constants = usage.constants(Bundle.open(bundle))
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
    programs: Annotated[
        bool,
        typer.Option(
            "--programs",
            help="Also run every program in ExecuTorch's own runtime, on the same text. This needs the extra 'build'.",
        ),
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
) -> None:
    """Prove that a bundle is whole and shared. This hashes every file, computes every key again from its bytes, finds
    every key that a program names, and compares each adapter with the base.

    The exit code is 2 if something is damaged or missing, and 1 if an adapter changes nothing.
    """
    from bedplate.assemble.verify import verify_bundle

    opened = Bundle.open(bundle)  # hashes every file
    verdict = verify_bundle(opened, programs=programs, threads=threads)
    idle = verdict.without_effect
    if as_json:
        fields = {name: value for name, value in vars(verdict).items() if value is not None}
        print_json({"ok": not idle, **fields, "without_effect": idle})
    else:
        _show_verdict(opened, verdict, idle)
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
    programs: Annotated[
        bool,
        typer.Option(
            "--programs",
            help="Measure the programs in ExecuTorch's own runtime instead. This needs the extra 'build'.",
        ),
    ] = False,
    kv: KvPrecision = "float16",
    threads: Threads = None,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Measure what quantization costs. This compares base and adapters with the float model on a text."""
    from bedplate import api

    with progress_bars() as bars:
        found = api.evaluate(
            Bundle.open(bundle, check=not no_check),
            model,
            text,
            adapters=adapter,
            programs=programs,
            kv=kv,
            threads=threads,
            reporter=bars,
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


def bench(
    bundle: BundlePath,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="Adapter to measure. Without this option: the base.")
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Length of a prompt. You can give this option more than once."),
    ] = None,
    answer: Annotated[
        int, typer.Option(metavar="N", help="How many tokens to generate in each session.")
    ] = 64,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="How many sessions step together. You can give it more than once."),
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Position where answers begin. You can give it more than once."),
    ] = None,
    runs: Annotated[int, typer.Option(help="How many times to run each test. The best run counts.")] = 3,
    threads: Threads = None,
    no_check: NoCheck = False,
    as_json: Json = False,
) -> None:
    """Measure how fast a bundle runs: tokens per second of prompts and answers, by batch and by position."""
    from bedplate.runtime.bench import measure_speed
    from bedplate.runtime.engine import Engine

    # What a run has computed must not spare the next one its work.
    with Engine(Bundle.open(bundle, check=not no_check), threads=threads, cache_bytes=0) as engine:
        speeds = list(
            measure_speed(
                engine,
                adapter=adapter,
                prompts=prompt or [16, 256],
                answers=answer,
                batches=batch or [1, 4, 8],
                positions=position or [0, 512],
                runs=runs,
            )
        )
    if as_json:
        print_json(speeds)
        return
    rows = [
        [one.test, str(one.sessions), str(one.position), str(one.tokens), f"{one.tokens_per_second:.1f}"]
        for one in speeds
    ]
    columns = ["test", ">sessions", ">position", ">tokens", ">tokens/s"]
    print_table(f"{bundle}, {adapter or 'base'}", columns, rows)


def _show_verdict(opened: Bundle, verdict: Verdict, idle: list[str]) -> None:
    sharing = verdict.sharing
    programs = {use.name: use for use in sharing.programs}
    effects = {effect.name: effect for effect in verdict.effects}
    rows = []
    for name in (usage.BASE, *opened.adapters):
        use, effect = programs.get(name), effects.get(name)
        row = [name, size(verdict.own.get(name, 0))]
        row += ["–", "–"] if use is None else [str(use.keys), size(use.from_foundation)]
        row += ["", ""] if effect is None else [f"{effect.mean_kl:.4f}", f"{effect.top1_changed:.0%}"]
        rows.append(row)
        if (use := programs.get(usage.static_name(name))) is not None:
            rows.append([use.name, "", str(use.keys), size(use.from_foundation), "", ""])
    columns = [
        "name",
        ">own",
        ">keys of its program",
        ">from foundation",
        ">mean KL to base",
        ">top-1 changed",
    ]
    print_table(f"{opened.path}: every file as it was written, every key proven and resolved", columns, rows)
    shared = f", of which {size(sharing.shared)} serve two programs or more" if programs else ", no programs"
    stdout.print(f"foundation {size(sharing.foundation)}{shared}")
    if verdict.programs is not None:
        rows = [
            [one.name, f"{one.from_ours.mean_kl:.4f}", f"{one.from_ours.top1_changed:.0%}"]
            + (
                ["", ""]
                if one.effect is None
                else [f"{one.effect.mean_kl:.4f}", f"{one.effect.top1_changed:.0%}"]
            )
            for one in verdict.programs
        ]
        columns = ["program", ">mean KL to bedplate", ">top-1 other", ">mean KL to base", ">top-1 changed"]
        print_table("programs in ExecuTorch's own runtime", columns, rows)
    if idle:
        stdout.print(f"NOT OK: without effect: {', '.join(idle)}")
    else:
        stdout.print("OK")
