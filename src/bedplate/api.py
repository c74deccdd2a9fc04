"""The Python API: what the command line does, as functions. Defaults live here.

What makes bundles is imported when it is called: a process that only runs one starts sooner without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bedplate.assemble.report import SILENT, Reporter
from bedplate.bundle import store
from bedplate.quantize.options import METHOD, RECOVERY_RANK, AdapterScheme, Method

if TYPE_CHECKING:
    from bedplate.assemble.evaluate import Evaluation
    from bedplate.compile.cache import UnitCache


class Bundle(store.Bundle):
    """An open bundle, to which adapters can be added."""

    def add(
        self,
        adapter: str | Path,
        *,
        name: str,
        quantize: AdapterScheme | None = None,
        exact_rank: bool = False,
        allow_noop: bool = False,
        unit_cache: str | Path | None = None,
        reporter: Reporter = SILENT,
    ) -> store.AdapterEntry:
        """Pack a LoRA adapter against this bundle's foundation and add it as `name`.

        adapter: a folder of PEFT, torchtune or MLX-LM, or a `.gguf` file of llama.cpp.

        quantize: `8w` stores A and B in 8 bits, `none` in float32; None: in 8 bits, unless the foundation is float32.
        exact_rank: compile for the adapter's own rank, even if units of a somewhat higher one are there.
        allow_noop: add it even if it changes nothing; otherwise it is compared with the base on a short text.
        unit_cache: folder of compiled units; None is the user's cache folder.
        Raises a BedplateError that says what does not fit; the bundle is then as it was.
        """
        (entry,) = self.add_all(
            {name: adapter},
            quantize=quantize,
            exact_rank=exact_rank,
            allow_noop=allow_noop,
            unit_cache=unit_cache,
            reporter=reporter,
        )
        return entry

    def add_all(
        self,
        adapters: Mapping[str, str | Path],
        *,
        quantize: AdapterScheme | None = None,
        exact_rank: bool = False,
        allow_noop: bool = False,
        unit_cache: str | Path | None = None,
        reporter: Reporter = SILENT,
    ) -> list[store.AdapterEntry]:
        """Add several adapters by their names, all or none. Otherwise as `add`."""
        from bedplate.assemble.add import add_adapters

        sources = {name: Path(adapter) for name, adapter in adapters.items()}
        add_adapters(
            self,
            sources,
            quantize=quantize,
            exact_rank=exact_rank,
            allow_noop=allow_noop,
            cache=open_cache(unit_cache, reporter),
            reporter=reporter,
        )
        return [self.adapters[name] for name in sources]

    def export(
        self,
        out: str | Path,
        *,
        adapter: str | None = None,
        self_contained: bool = False,
        with_foundation: bool = False,
    ) -> None:
        """Write the program of `adapter` (None: of the base) as one stock ExecuTorch file.

        self_contained: with the adapter's constants inside, so that it wants `foundation.ptd` alone.
        with_foundation: with the foundation's inside, so that it wants no data file of it.
        NotFoundError: there is no such adapter, or no folder to write to.
        """
        from bedplate.assemble.export import export_program

        export_program(
            self, Path(out), adapter=adapter, self_contained=self_contained, with_foundation=with_foundation
        )

    def remove(self, name: str) -> None:
        """Remove an adapter. NotFoundError: there is none of this name."""
        self.remove_adapter(name)


def build(
    model: str | Path,
    out: str | Path,
    *,
    quantize: str = "8da4w",
    group_size: int = 32,
    method: Method = METHOD,
    embedding: Literal["4", "8", "float"] = "8",
    head: str | None = None,
    overrides: Mapping[str, str] | None = None,
    recovery_rank: int = RECOVERY_RANK,
    bytes_per_weight: float | None = None,
    target_kl: float | None = None,
    calibration: str | Path | None = None,
    max_context: int | None = None,
    unit_cache: str | Path | None = None,
    reporter: Reporter = SILENT,
    force: bool = False,
) -> Bundle:
    """Build a bundle at `out` from a Hugging Face folder or a `.gguf` file.

    quantize: `8da4w`, `8da8w` or `none`; group_size, method, embedding, head and overrides refine it, see
    `quantize.recipe.make_recipe`. recovery_rank: directions in which 4-bit weights get their error back; 0: none.
    bytes_per_weight, target_kl: one of them: choose 8 bits instead of 4 for some linears and the head, by what 4 bits
    of each cost on the calibration text, within so many bytes a weight, or until the mean KL is so small.
    calibration: a text that the model might read, on which choices and recovery are measured; None: bedplate's own.
    max_context: positions that a session can hold; None: 2,048, or as many as the model has, if those are fewer.
    force: replace a bundle at `out`.
    Raises a BedplateError that says what is wrong; nothing is then left at `out`.
    """
    from bedplate.assemble.build import build_bundle
    from bedplate.quantize.recipe import Goal, make_recipe

    goal = None
    if bytes_per_weight is not None or target_kl is not None:
        goal = Goal(bytes_per_weight=bytes_per_weight, target_kl=target_kl)
    recipe = make_recipe(
        quantize,
        group_size=group_size,
        method=method,
        embedding=embedding,
        head=head,
        overrides=overrides,
        recovery_rank=recovery_rank,
    )
    build_bundle(
        Path(model),
        Path(out),
        recipe=recipe,
        goal=goal,
        calibration=None if calibration is None else Path(calibration),
        max_context=max_context,
        cache=open_cache(unit_cache, reporter),
        reporter=reporter,
        force=force,
    )
    return Bundle.open(out, check=False)


def evaluate(
    bundle: store.Bundle,
    model: str | Path,
    text: str | Path,
    *,
    adapters: Sequence[str] | None = None,
    threads: int | None = None,
    reporter: Reporter = SILENT,
) -> list[Evaluation]:
    """What quantization costs: the bundle's programs against the float checkpoint it was built from, on a text file.

    adapters: beside the base; None: all of them. Raises a BedplateError that says what is wrong.
    """
    from bedplate.assemble.evaluate import evaluate_bundle

    return evaluate_bundle(
        bundle, Path(model), Path(text), adapters=adapters, threads=threads, reporter=reporter
    )


def open_cache(folder: str | Path | None, reporter: Reporter = SILENT) -> UnitCache:
    """Compiled units in a folder; None: in the user's cache folder. The reporter is told if they cannot be kept."""
    from bedplate.compile.cache import UnitCache

    if folder is None:
        return UnitCache.default(notice=reporter.notice)
    return UnitCache(Path(folder), notice=reporter.notice)
