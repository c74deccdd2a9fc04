"""Commands that make and change bundles."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from bedplate import api
from bedplate.bundle import store
from bedplate.cli.output import print_json, print_table, progress_bars, size, stderr
from bedplate.errors import AdapterError, NameTakenError, RecipeError
from bedplate.quantize.options import METHOD, RECOVERY_RANK, AdapterScheme

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")]
CacheFolder = Annotated[
    Path | None, typer.Option(help="Folder of compiled units; the user's cache folder if absent.")
]
Scheme = Literal["8da4w", "8da8w", "none"]


def build(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face folder or .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="Folder to create.")],
    quantize: Annotated[
        Scheme, typer.Option(help="Of linears: 4 or 8 bits (activations take 8), or none: float32.")
    ] = "8da4w",
    group_size: Annotated[int, typer.Option(help="Columns that share a 4-bit scale; 0: a whole row.")] = 32,
    method: Annotated[
        Literal["offset", "hqq", "plain"],
        typer.Option(
            help="How 4-bit codes are chosen: with an offset for each group, for least error, by range."
        ),
    ] = METHOD,
    embedding: Annotated[
        Literal["4", "8", "float"], typer.Option(help="Bits of the embedding, unless --quantize none.")
    ] = "8",
    head: Annotated[
        Scheme | None, typer.Option(help="Of the head alone; if absent, 8da8w beside 8da4w.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME",
            help="Of some linears, e.g. 'layers.*.mlp.down_proj=8da8w'; may be given more than once.",
        ),
    ] = None,
    recovery_rank: Annotated[
        int, typer.Option(help="Directions in which 4-bit weights get their error back; 0: none.")
    ] = RECOVERY_RANK,
    bytes_per_weight: Annotated[
        float | None,
        typer.Option(help="Choose 8 bits instead of 4 where they help most, within so many bytes a weight."),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(help="Choose 8 bits instead of 4 until the mean KL to the float model is so small."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to measure choices and recovery on; bedplate's own if absent."
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Positions that a session can hold. If absent: 2,048, or all that the model has, if fewer."
        ),
    ] = None,
    unit_cache: CacheFolder = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the bundle that is there, with its adapters.")
    ] = False,
) -> None:
    """Build a bundle from a model. Its weights are quantized and packed, its program compiled."""
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
            help="Name in the bundle, one for each ADAPTER; that of its folder or file if absent.",
        ),
    ] = None,
    quantize: Annotated[
        AdapterScheme | None,
        typer.Option(
            help="Of their matrices: 8w (8 bits) or none (float32); if absent, 8w unless the base is float32."
        ),
    ] = None,
    exact_rank: Annotated[
        bool,
        typer.Option("--exact-rank", help="Compile for this very rank, even if a higher one would do."),
    ] = False,
    allow_noop: Annotated[
        bool, typer.Option("--allow-noop", help="Add adapters even if they change nothing.")
    ] = False,
    unit_cache: CacheFolder = None,
) -> None:
    """Add LoRA adapters to a bundle, all or none. Their matrices are packed against the bundle's foundation."""
    start = time.perf_counter()
    opened = api.Bundle.open(bundle)
    with progress_bars() as bars:
        entries = opened.add_all(
            _named(adapters, name or []),
            quantize=quantize,
            exact_rank=exact_rank,
            allow_noop=allow_noop,
            unit_cache=unit_cache,
            reporter=bars,
        )
    for entry in entries:
        files = entry.program.stat().st_size + entry.weights.stat().st_size
        filled = f", filled up to {entry.info.unit_rank}" if entry.info.unit_rank != entry.info.rank else ""
        stderr.print(f"added {entry.name}: rank {entry.info.rank}{filled}, {size(files)}")
    count = "1 adapter" if len(entries) == 1 else f"{len(entries)} adapters"
    stderr.print(f"{count} in {time.perf_counter() - start:.1f} s")


def _named(adapters: list[Path], names: list[str]) -> dict[str, Path]:
    if names and len(names) != len(adapters):
        raise AdapterError(
            f"{len(adapters)} adapters, but {len(names)} names", hint="give --name once for each, or never"
        )
    named = dict(zip(names or [_own_name(adapter) for adapter in adapters], adapters, strict=True))
    if len(named) < len(adapters):
        raise NameTakenError("two of the adapters have one name", hint="give --name once for each")
    return named


def _own_name(adapter: Path) -> str:
    path = adapter.resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def remove(
    bundle: BundlePath, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.")]
) -> None:
    """Remove an adapter from a bundle."""
    # Not through Bundle.open: removing a damaged adapter is how a bundle is mended.
    store.remove_adapter(bundle, name)
    stderr.print(f"removed {name}")


def export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .pte to write.")],
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="Adapter to export; the base if absent.")
    ] = None,
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained", help="Put the adapter's constants inside; it then wants foundation.ptd alone."
        ),
    ] = False,
    with_foundation: Annotated[
        bool,
        typer.Option(
            "--with-foundation", help="Put the foundation inside as well: one file that wants no other."
        ),
    ] = False,
) -> None:
    """Write a program as one .pte file. Any ExecuTorch runner that has the LLM operators takes it."""
    api.Bundle.open(bundle).export(
        out,
        adapter=adapter,
        self_contained=self_contained or with_foundation,
        with_foundation=with_foundation,
    )
    stderr.print(f"wrote {out}: {size(out.stat().st_size)}")


def cache_list(
    unit_cache: CacheFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for a script.")] = False,
) -> None:
    """List the compiled units on this machine."""
    cache = api.open_cache(unit_cache)
    entries = cache.entries()
    if as_json:
        print_json([{"kind": e.kind, "fingerprint": e.fingerprint, "bytes": e.nbytes} for e in entries])
        return
    print_table(
        str(cache.folder or "no home folder, so no units are kept"),
        ["kind", "fingerprint", ">bytes"],
        [[e.kind, e.fingerprint, f"{e.nbytes:,}"] for e in entries],
    )


def cache_clear(unit_cache: CacheFolder = None) -> None:
    """Remove the compiled units on this machine."""
    stderr.print(f"freed {size(api.open_cache(unit_cache).clear())}")


def _overrides(options: list[str]) -> dict[str, str]:
    overrides = {}
    for option in options:
        pattern, found, scheme = option.partition("=")
        if not found:
            raise RecipeError(f"--override {option}", hint="write PATTERN=SCHEME, e.g. 'lm_head=8da4w'")
        overrides[pattern] = scheme
    return overrides
