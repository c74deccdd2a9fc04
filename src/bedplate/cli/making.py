"""Commands that make and change bundles."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from bedplate import api
from bedplate.bundle import store
from bedplate.cli.options import BundlePath
from bedplate.cli.output import print_json, print_table, progress_bars, size, stderr
from bedplate.errors import AdapterError, NameTakenError, RecipeError
from bedplate.quantize.options import METHOD, RECOVERY_RANK, AdapterScheme

CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder of compiled units. Without this option: the user's cache folder.")
]
ExactRank = Annotated[
    bool,
    typer.Option(
        "--exact-rank",
        help="Compile for the rank of the adapter itself. Without this option, compiled units of a higher "
        "rank are used if there are some.",
    ),
]
AllowNoop = Annotated[bool, typer.Option("--allow-noop", help="Add an adapter even if it changes nothing.")]
NoPrograms = Annotated[
    bool,
    typer.Option(
        "--no-programs",
        help="Leave out the programs for ExecuTorch. Nothing is compiled. If the base has no program, the "
        "adapters get none in any case.",
    ),
]
Scheme = Literal["8da4w", "8da8w", "none"]


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face folder or .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder to create.")],
    quantize: Annotated[
        Scheme,
        typer.Option(
            help="How to store the linears: weights of 4 or 8 bits, both with activations of 8 bits; or none, "
            "which keeps float32."
        ),
    ] = "8da4w",
    group_size: Annotated[
        int, typer.Option(help="How many columns share a 4-bit scale. 0: the whole row.")
    ] = 32,
    method: Annotated[
        Literal["offset", "hqq", "plain"],
        typer.Option(
            help="How to choose 4-bit codes. offset: over each group's own range, with an offset that a correction "
            "adds. hqq: symmetric, with scales of the least error. plain: symmetric, with scales from the range."
        ),
    ] = METHOD,
    embedding: Annotated[
        Literal["4", "8", "float"],
        typer.Option(help="Bits of the embedding. With --quantize none it is always float."),
    ] = "8",
    head: Annotated[
        Scheme | None,
        typer.Option(
            help="How to store the head. Without this option: 8da8w if the rest is 8da4w, otherwise as the rest. With "
            "--bytes-per-weight or --target-kl, it is chosen like the linears."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="How to store the linears that match, e.g. 'layers.*.mlp.down_proj=8da8w'. You can give this option "
            "more than once; the first pattern that matches counts.",
        ),
    ] = None,
    recovery_rank: Annotated[
        int,
        typer.Option(help="How many directions of the error of 4-bit weights are corrected. 0: none."),
    ] = RECOVERY_RANK,
    bytes_per_weight: Annotated[
        float | None,
        typer.Option(
            help="Use 8 bits instead of 4 where this helps most, as long as a weight takes at most this many bytes "
            "on average."
        ),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(
            help="Use 8 bits instead of 4 where this helps most, until the mean KL to the float model is at most "
            "this."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text on which choices and recovery are measured. Without this option: bedplate's own.",
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="How many positions a program can hold. Without this option: 2,048, or what the model has, if "
            "that is less. It does not limit run and chat."
        ),
    ] = None,
    no_programs: Annotated[
        bool,
        typer.Option(
            "--no-programs",
            help="Leave out the programs for ExecuTorch. Nothing is compiled. The bundle runs here, but export does "
            "not work.",
        ),
    ] = False,
    static_shapes: Annotated[
        str | None,
        typer.Option(
            metavar="PREFILL,DECODE",
            help="Also make programs of fixed shapes, as accelerators want them. Their method `prefill` takes PREFILL "
            "tokens, `decode` takes DECODE, e.g. 64,1.",
        ),
    ] = None,
    split_heads: Annotated[
        bool,
        typer.Option("--split-heads", help="In programs of fixed shapes, compute each head by itself."),
    ] = False,
    unit_cache: CacheFolder = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing bundle. Its adapters are lost.")
    ] = False,
) -> None:
    """Build a bundle from a model. This quantizes and packs the weights and compiles the program for ExecuTorch."""
    start = time.perf_counter()
    with progress_bars() as bars:
        bundle = api.build(
            model,
            out,
            quantize=quantize,
            group_size=group_size,
            method=method,
            embedding=embedding,
            head=head,
            overrides=_overrides(override or []),
            recovery_rank=recovery_rank,
            bytes_per_weight=bytes_per_weight,
            target_kl=target_kl,
            calibration=calibration,
            max_context=max_context,
            programs=not no_programs,
            static_shapes=None if static_shapes is None else _lengths(static_shapes),
            split_heads=split_heads,
            unit_cache=unit_cache,
            reporter=bars,
            force=force,
        )
    foundation = bundle.foundation.stat().st_size
    stderr.print(f"built {out} in {time.perf_counter() - start:.1f} s: foundation {size(foundation)}")


def add(
    bundle: BundlePath,
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...",
            help="LoRA adapters: folders of PEFT, torchtune or MLX-LM, or .gguf files of llama.cpp.",
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name in the bundle. Give it once for each ADAPTER. Without this option: the name of its folder "
            "or file.",
        ),
    ] = None,
    quantize: Annotated[
        AdapterScheme | None,
        typer.Option(
            help="How to store the matrices of the adapters: 8w (8 bits) or none (float32). Without this option: "
            "none if the base is float32, otherwise 8w."
        ),
    ] = None,
    exact_rank: ExactRank = False,
    allow_noop: AllowNoop = False,
    no_programs: NoPrograms = False,
    unit_cache: CacheFolder = None,
) -> None:
    """Add LoRA adapters to a bundle. If one of several does not fit, none is added."""
    start = time.perf_counter()
    opened = api.Bundle.open(bundle, check=False)
    with progress_bars() as bars:
        entries = opened.add_all(
            _named(adapters, name or []),
            check_base=True,
            quantize=quantize,
            exact_rank=exact_rank,
            allow_noop=allow_noop,
            programs=not no_programs,
            unit_cache=unit_cache,
            reporter=bars,
        )
    for entry in entries:
        _print_added(entry)
    count = "1 adapter" if len(entries) == 1 else f"{len(entries)} adapters"
    stderr.print(f"{count} in {time.perf_counter() - start:.1f} s")


def _named(adapters: list[Path], names: list[str]) -> dict[str, Path]:
    if names and len(names) != len(adapters):
        raise AdapterError(
            f"{len(adapters)} adapters, but {len(names)} names",
            hint="give --name once for each adapter, or leave it out",
        )
    named = dict(zip(names or [_own_name(adapter) for adapter in adapters], adapters, strict=True))
    if len(named) < len(adapters):
        raise NameTakenError(
            "two of the adapters have the same name", hint="give --name once for each adapter"
        )
    return named


def _own_name(adapter: Path) -> str:
    path = adapter.resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def merge(
    bundle: BundlePath,
    weights: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT...", help="Adapters of the bundle, each with its weight: a=0.7 b=0.3."
        ),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the sum in the bundle.")],
    quantize: Annotated[
        AdapterScheme,
        typer.Option(help="How to store the sum: none (float32), or 8w (8 bits), which rounds it."),
    ] = "none",
    exact_rank: ExactRank = False,
    allow_noop: AllowNoop = False,
    no_programs: NoPrograms = False,
    unit_cache: CacheFolder = None,
) -> None:
    """Add the weighted sum of LoRA adapters of a bundle. It is exact: their ranks add up."""
    start = time.perf_counter()
    opened = api.Bundle.open(bundle)
    with progress_bars() as bars:
        entry = opened.merge(
            _weights(weights),
            name=name,
            quantize=quantize,
            exact_rank=exact_rank,
            allow_noop=allow_noop,
            programs=not no_programs,
            unit_cache=unit_cache,
            reporter=bars,
        )
    _print_added(entry)
    stderr.print(f"{len(weights)} adapters merged in {time.perf_counter() - start:.1f} s")


def _weights(options: list[str]) -> dict[str, float]:
    weights = {}
    for option in options:
        name, found, weight = option.partition("=")
        try:
            value = float(weight)
        except ValueError:
            found, value = "", 0.0
        if not found or name in weights:
            what = f"{name} is named twice" if found else f"{option!r} is no adapter with its weight"
            raise AdapterError(what, hint="write ADAPTER=WEIGHT once for each, e.g. a=0.7 b=0.3")
        weights[name] = value
    return weights


def _print_added(entry: store.AdapterEntry) -> None:
    filled = f", filled up to {entry.info.unit_rank}" if entry.info.unit_rank > entry.info.rank else ""
    stderr.print(f"added {entry.name}: rank {entry.info.rank}{filled}, {size(entry.nbytes)}")


def remove(
    bundle: BundlePath, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.")]
) -> None:
    """Remove an adapter from a bundle."""
    # Not through Bundle.open: removing a damaged adapter is how a bundle is mended.
    store.remove_adapter(bundle, name)
    stderr.print(f"removed {name}")


def export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .pte file to write.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="Adapter to export. Without this option: the base.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Export the program of fixed shapes.")] = False,
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained",
            help="Put the constants of the adapter into the file. It then needs foundation.ptd only.",
        ),
    ] = False,
    with_foundation: Annotated[
        bool,
        typer.Option(
            "--with-foundation", help="Put the foundation into the file, too. It then needs no other file."
        ),
    ] = False,
) -> None:
    """Write a program as one .pte file. Any ExecuTorch runner that has the LLM operators can run it."""
    api.Bundle.open(bundle).export(
        out,
        adapter=adapter,
        static=static,
        self_contained=self_contained or with_foundation,
        with_foundation=with_foundation,
    )
    stderr.print(f"wrote {out}: {size(out.stat().st_size)}")


cache = typer.Typer(
    help="Show or remove the compiled units on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@cache.command("list")
def cache_list(
    unit_cache: CacheFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the compiled units on this machine."""
    found = api.open_cache(unit_cache)
    entries = found.entries()
    if as_json:
        print_json([{"kind": e.kind, "fingerprint": e.fingerprint, "bytes": e.nbytes} for e in entries])
        return
    print_table(
        str(found.folder or "no units are kept, because there is no home folder"),
        ["kind", "fingerprint", ">bytes"],
        [[e.kind, e.fingerprint, f"{e.nbytes:,}"] for e in entries],
    )


@cache.command("clear")
def cache_clear(unit_cache: CacheFolder = None) -> None:
    """Remove the compiled units on this machine."""
    stderr.print(f"freed {size(api.open_cache(unit_cache).clear())}")


def _lengths(option: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", option)
    if match is None:
        raise RecipeError(
            f"--static-shapes {option} is not two numbers",
            hint="write PREFILL,DECODE, e.g. --static-shapes 64,1",
        )
    return int(match[1]), int(match[2])


def _overrides(options: list[str]) -> dict[str, str]:
    overrides = {}
    for option in options:
        pattern, found, scheme = option.partition("=")
        if not found:
            raise RecipeError(
                f"--override {option} has no scheme", hint="write PATTERN=SCHEME, e.g. 'lm_head=8da4w'"
            )
        overrides[pattern] = scheme
    return overrides
